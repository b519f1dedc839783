// A guest that keeps no rule: 64-bit code without a kernel, which speaks to every device of the VMM and lies to it.
//
// It is entered as Linux is (64-bit boot protocol), reads `hostile=MODE` and `devices=N` from the command line, waits until the bus
// has N devices, and says on the serial port what it saw. Modes:
//
//   registers  random writes to configuration space, device registers and I/O ports
//   rings      every attack of attacks[] on every queue of every device; then each device that can must still work
//   doorbells  notifications by the ten thousand, with nothing behind them; then as above
//   resets     devices reset while requests are in flight; then as above
//   failures   one device broken again and again
//   flood      all of it, for ever
//   spin       nothing at all, for ever
//
// Device registers are where this VMM has them (vmm/src/virtio/transport.rs); a driver would read the capabilities.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum { SLOTS = 32, QUEUE = 16, QUEUES = 8, BUFFER = 4096 };
enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };
enum { ACKNOWLEDGED = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 64 };
enum { ID_NET = 1, ID_BLOCK = 2, ID_VSOCK = 19 };
#define ECAM 0xe0000000UL
#define EVENT_IDX (1U << 29)
// Above any memory of this guest.
#define NOWHERE 0xfffff0000000UL
// Looks at a device before it is called stuck, and before it is called silent. The device's thread may wait for this very processor.
#define PATIENCE 40000000UL
#define GLANCE 4000000UL

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static u32 in32(u16 port)
{
	u32 value;
	__asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}
static void barrier(void) { __asm__ volatile("mfence" ::: "memory"); }

static void write8(u64 at, u8 value) { *(volatile u8 *)at = value; }
static void write16(u64 at, u16 value) { *(volatile u16 *)at = value; }
static void write32(u64 at, u32 value) { *(volatile u32 *)at = value; }
static void write64(u64 at, u64 value) { *(volatile u64 *)at = value; }
static u8 read8(u64 at) { return *(volatile u8 *)at; }
static u16 read16(u64 at) { return *(volatile u16 *)at; }
static u32 read32(u64 at) { return *(volatile u32 *)at; }

static void print(const char *text)
{
	while (*text)
		out8(0x3f8, *text++);
}

static void print_number(u64 number)
{
	char digits[21], *at = digits + 20;
	*at = 0;
	do
		*--at = '0' + number % 10;
	while (number /= 10);
	print(at);
}

static u64 seed = 88172645463325252UL;
static u64 random(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

// The first 4 GiB mapped to themselves; the VMM maps one.
static u64 level4[512] __attribute__((aligned(4096))), level3[512] __attribute__((aligned(4096)));
static u64 level2[4][512] __attribute__((aligned(4096)));

static void map(void)
{
	for (u64 page = 0; page < 4 * 512; page++)
		level2[page / 512][page % 512] = page << 21 | 0x83;
	for (u64 i = 0; i < 4; i++)
		level3[i] = (u64)level2[i] | 3;
	level4[0] = (u64)level3 | 3;
	__asm__ volatile("mov %0, %%cr3" ::"r"(level4) : "memory");
}

struct descriptor { u64 address; u32 length; u16 flags, next; };
struct rings {
	struct descriptor table[QUEUE];
	struct { u16 flags, index, ring[QUEUE], event; } available __attribute__((aligned(1024)));
	struct { u16 flags, index; struct { u32 id, length; } ring[QUEUE]; u16 event; } used __attribute__((aligned(1024)));
} __attribute__((aligned(4096)));

static volatile struct rings rings[QUEUES];
static u8 buffers[QUEUES][BUFFER] __attribute__((aligned(4096)));

struct device { u64 config, registers, doorbells; u16 id, queues; };
static struct device devices[SLOTS];
static u32 count;

// Each of 32 bits.
static u64 bar(u64 config, u32 index) { return read32(config + 0x10 + 4 * index) & ~15U; }

static void find(void)
{
	count = 0;
	for (u64 slot = 0; slot < SLOTS; slot++) {
		u64 config = ECAM + (slot << 15);
		if (read16(config) != 0x1af4)
			continue;
		struct device *device = &devices[count++];
		write16(config + 4, 6);
		device->config = config;
		device->registers = bar(config, 0);
		device->doorbells = bar(config, 1);
		device->id = read16(config + 2) - 0x1040;
		u16 queues = read16(device->registers + 0x12);
		device->queues = queues < QUEUES ? queues : QUEUES;
	}
}

static u8 status(struct device *device) { return read8(device->registers + 0x14); }

// Writes 0 and waits until it reads so.
static int reset(struct device *device)
{
	write8(device->registers + 0x14, 0);
	for (u64 i = 0; i < PATIENCE; i++)
		if (status(device) == 0)
			return 1;
	return 0;
}

static void enable_queue(struct device *device, u16 queue, u64 table, u64 available, u64 used)
{
	u64 at = device->registers;
	write16(at + 0x16, queue);
	write16(at + 0x18, QUEUE);
	write32(at + 0x20, table);
	write32(at + 0x24, table >> 32);
	write32(at + 0x28, available);
	write32(at + 0x2c, available >> 32);
	write32(at + 0x30, used);
	write32(at + 0x34, used >> 32);
	write16(at + 0x1c, 1);
}

// All that is offered but event indexes, up to FEATURES_OK.
static void negotiate(struct device *device)
{
	u64 at = device->registers;
	write8(at + 0x14, ACKNOWLEDGED);
	write8(at + 0x14, ACKNOWLEDGED | DRIVER);
	for (u32 half = 0; half < 2; half++) {
		write32(at, half);
		write32(at + 8, half);
		write32(at + 0xc, read32(at + 4) & ~(half ? 0 : EVENT_IDX));
	}
	write8(at + 0x14, ACKNOWLEDGED | DRIVER | FEATURES_OK);
}

static int begin(struct device *device)
{
	if (!reset(device))
		return 0;
	for (u64 i = 0; i < sizeof rings / 8; i++)
		((volatile u64 *)rings)[i] = 0;
	negotiate(device);
	for (u16 queue = 0; queue < device->queues; queue++)
		enable_queue(device, queue, (u64)rings[queue].table, (u64)&rings[queue].available, (u64)&rings[queue].used);
	write8(device->registers + 0x14, ACKNOWLEDGED | DRIVER | FEATURES_OK | DRIVER_OK);
	return 1;
}

static void kick(struct device *device, u16 queue) { write16(device->doorbells + 4 * queue, queue); }

static void put(u16 queue, u16 index, u64 address, u32 length, u16 flags, u16 next)
{
	rings[queue].table[index] = (struct descriptor){ address, length, flags, next };
}

static void publish(u16 queue, u16 head)
{
	rings[queue].available.ring[rings[queue].available.index % QUEUE] = head;
	barrier();
	rings[queue].available.index++;
	barrier();
}

// 'u' if the device gave something back, 'r' if it needs a reset, 's' if it did neither.
static char outcome(struct device *device, u16 queue, u64 patience)
{
	for (u64 i = 0; i < patience; i++) {
		if (status(device) & NEEDS_RESET)
			return 'r';
		if (rings[queue].used.index)
			return 'u';
	}
	return 's';
}

static void attack_index(u16 queue) { rings[queue].available.index = 0x8000; }
static void attack_loop(u16 queue)
{
	put(queue, 0, (u64)buffers[queue], 16, DESC_NEXT, 1);
	put(queue, 1, (u64)buffers[queue], 16, DESC_NEXT, 0);
	publish(queue, 0);
}
static void attack_outside(u16 queue)
{
	put(queue, 0, NOWHERE, 64, DESC_NEXT, 1);
	put(queue, 1, NOWHERE, 4096, DESC_WRITE, 0);
	publish(queue, 0);
}
static void attack_overflow(u16 queue)
{
	put(queue, 0, -8UL, 64, DESC_WRITE, 0);
	publish(queue, 0);
}
static void attack_length(u16 queue)
{
	put(queue, 0, (u64)buffers[queue], 0xffffffff, 0, 0);
	publish(queue, 0);
}
static void attack_next(u16 queue)
{
	put(queue, 0, (u64)buffers[queue], 16, DESC_NEXT, 0xffff);
	publish(queue, 0);
}
static void attack_head(u16 queue) { publish(queue, 0xffff); }
static void attack_nested(u16 queue)
{
	put(queue, 0, (u64)rings[queue].table, sizeof rings[queue].table, DESC_INDIRECT, 0);
	publish(queue, 0);
}
static void attack_odd(u16 queue)
{
	put(queue, 0, (u64)buffers[queue], 17, DESC_INDIRECT, 0);
	publish(queue, 0);
}
static void attack_order(u16 queue)
{
	put(queue, 0, (u64)buffers[queue], 16, DESC_WRITE | DESC_NEXT, 1);
	put(queue, 1, (u64)buffers[queue], 16, 0, 0);
	publish(queue, 0);
}
static void attack_empty(u16 queue)
{
	put(queue, 0, (u64)buffers[queue], 0, 0, 0);
	publish(queue, 0);
}
// Buffers that are the rings: what the device writes changes what it reads next.
static void attack_itself(u16 queue)
{
	put(queue, 0, (u64)buffers[queue], 64, DESC_NEXT, 1);
	put(queue, 1, (u64)&rings[queue], sizeof rings[queue], DESC_WRITE, 0);
	for (int i = 0; i < QUEUE; i++)
		publish(queue, 0);
}
static void attack_random(u16 queue)
{
	for (u64 i = 0; i < sizeof rings[queue] / 8; i++)
		((volatile u64 *)&rings[queue])[i] = random() & random();
}

static const struct { const char *name; void (*run)(u16 queue); } attacks[] = {
	{ "index", attack_index }, { "loop", attack_loop }, { "outside", attack_outside }, { "overflow", attack_overflow },
	{ "length", attack_length }, { "next", attack_next }, { "head", attack_head }, { "nested", attack_nested },
	{ "odd", attack_odd }, { "order", attack_order }, { "empty", attack_empty }, { "itself", attack_itself },
	{ "random", attack_random },
};
enum { ATTACKS = sizeof attacks / sizeof attacks[0] };

static void report(struct device *device, u16 queue, const char *attack, const char *seen)
{
	print("device ");
	print_number(device->id);
	print(" queue ");
	print_number(queue);
	print(" ");
	print(attack);
	print(": ");
	print(seen);
	print("\n");
}

// A queue that a device has nothing to say on may stay silent.
static void rings_mode(void)
{
	for (u32 i = 0; i < count; i++)
		for (u16 queue = 0; queue < devices[i].queues; queue++)
			for (u32 attack = 0; attack < ATTACKS; attack++) {
				struct device *device = &devices[i];
				if (!begin(device)) {
					report(device, queue, attacks[attack].name, "stuck");
					break;
				}
				attacks[attack].run(queue);
				kick(device, queue);
				char seen = outcome(device, queue, GLANCE);
				report(device, queue, attacks[attack].name, seen == 'r' ? "reset" : seen == 'u' ? "used" : "silent");
			}
	// Rings where there is no memory.
	for (u32 i = 0; i < count; i++) {
		reset(&devices[i]);
		negotiate(&devices[i]);
		enable_queue(&devices[i], 0, NOWHERE, NOWHERE, NOWHERE);
		write8(devices[i].registers + 0x14, ACKNOWLEDGED | DRIVER | FEATURES_OK | DRIVER_OK);
		report(&devices[i], 0, "nowhere", outcome(&devices[i], 1, GLANCE) == 'r' ? "reset" : "silent");
	}
}

// A whole disk request: the first sector.
static void post_read(u16 head)
{
	u8 *header = buffers[0];
	for (int i = 0; i < 16; i++)
		header[i] = 0;
	put(0, head, (u64)header, 16, DESC_NEXT, head + 1);
	put(0, head + 1, (u64)buffers[1], 512, DESC_NEXT | DESC_WRITE, head + 2);
	put(0, head + 2, (u64)buffers[2], 1, DESC_WRITE, 0);
	publish(0, head);
}

// Requests that keep the rules, to the devices that answer by themselves.
static void check(void)
{
	for (u32 i = 0; i < count; i++) {
		struct device *device = &devices[i];
		if (device->id != ID_BLOCK)
			continue;
		if (!begin(device)) {
			report(device, 0, "check", "stuck");
			continue;
		}
		buffers[2][0] = 0xff;
		post_read(0);
		kick(device, 0);
		char seen = outcome(device, 0, PATIENCE);
		int good = seen == 'u' && ((volatile u8 *)buffers[2])[0] == 0;
		report(device, 0, "check", good ? "works" : "broken");
		reset(device);
	}
}

static void doorbells(u64 rounds)
{
	for (u64 i = 0; i < rounds; i++)
		for (u32 j = 0; j < count; j++)
			kick(&devices[j], random() % devices[j].queues);
}

static void doorbells_mode(u64 rounds)
{
	// All at once: each has the same rings, and nobody a buffer.
	for (u32 i = 0; i < count; i++)
		if (!begin(&devices[i]))
			report(&devices[i], 0, "doorbells", "stuck");
	doorbells(rounds);
}

// What the device would do, given time. Each has the rings for itself: whoever is still at work when they are filled for the next one
// breaks, and a device that has broken often enough is not started again.
static void resets_mode(u64 rounds)
{
	for (u64 i = 0; i < rounds; i++)
		for (u32 j = 0; j < count; j++) {
			struct device *device = &devices[j];
			if (!begin(device))
				report(device, 0, "resets", "stuck");
			for (u16 head = 0; head + 3 <= QUEUE; head += 3)
				post_read(head);
			kick(device, 0);
			if (random() % 2)
				kick(device, random() % device->queues);
			if (random() % 2)
				outcome(device, 0, random() % 4096);
			if (!reset(device))
				report(device, 0, "resets", "stuck");
		}
}

static void failures_mode(u64 rounds)
{
	for (u64 i = 0; i < rounds; i++) {
		struct device *device = &devices[i % count];
		if (!begin(device))
			report(device, 0, "failures", "stuck");
		attack_index(0);
		kick(device, 0);
		if (i % 2)
			outcome(device, 0, 1000);
	}
}

static int is_special(u16 port)
{
	return (port >= 0x5fd && port <= 0x602) || (port >= 0x61 && port <= 0x64) || (port >= 0x3f5 && port <= 0x3ff);
}

static void write_any(u64 at)
{
	u64 value = random() & (random() % 2 ? ~0UL : 0xff);
	switch (random() % 4) {
	case 0: write8(at, value); break;
	case 1: write16(at & ~1UL, value); break;
	case 2: write32(at & ~3UL, value); break;
	default: write64(at & ~7UL, value);
	}
}

static void registers_mode(u64 rounds)
{
	for (u64 i = 0; i < rounds; i++) {
		struct device *device = &devices[random() % count];
		// Bits of the status, so that some devices come as far as to start.
		if (random() % 8 == 0)
			write8(device->registers + 0x14, random() & 0x4f);
		switch (random() % 4) {
		case 0: write_any(device->config + random() % 256); break;
		case 1: write_any(device->registers + random() % 4096); break;
		case 2: write_any(device->doorbells + random() % 4096); break;
		default: write_any(ECAM + random() % (16 << 20));
		}
		u16 port = random();
		if (!is_special(port)) {
			out32(port & ~3, random());
			in32(port & ~3);
		}
	}
}

// Where BARs went, nobody knows: back to where they were, so that devices can be checked. Only when none lies over another's is what
// each shows its own.
static void put_back(void)
{
	for (u32 i = 0; i < count; i++) {
		write32(devices[i].config + 0x10, devices[i].registers);
		write32(devices[i].config + 0x14, devices[i].doorbells);
	}
	for (u32 i = 0; i < count; i++)
		write16(devices[i].config + 4, 6);
}

static u64 argument(const char *line, const char *name, const char **value)
{
	for (; *line; line++) {
		u64 length = 0;
		while (name[length] && line[length] == name[length])
			length++;
		if (name[length])
			continue;
		u64 number = 0;
		*value = line += length;
		while (*line >= '0' && *line <= '9')
			number = 10 * number + *line++ - '0';
		return number;
	}
	*value = "";
	return 0;
}

static int is(const char *value, const char *word)
{
	while (*word && *value == *word)
		value++, word++;
	return !*word;
}

static void off(void)
{
	out8(0x600, 5 << 2 | 1 << 5);
	for (;;)
		__asm__ volatile("hlt");
}

void guest(u64 parameters);
void guest(u64 parameters)
{
	const char *line = (const char *)(u64)read32(parameters + 0x228), *mode, *unused;
	u64 wanted = argument(line, "devices=", &unused);
	argument(line, "hostile=", &mode);
	map();
	do
		find();
	while (count < wanted);
	print("devices ");
	print_number(count);
	print("\n");
	if (is(mode, "registers")) {
		registers_mode(20000);
		put_back();
	} else if (is(mode, "rings")) {
		rings_mode();
	} else if (is(mode, "doorbells")) {
		doorbells_mode(3000);
	} else if (is(mode, "resets")) {
		resets_mode(200);
	} else if (is(mode, "failures")) {
		failures_mode(5000);
		off();
	} else if (is(mode, "flood")) {
		for (;;) {
			doorbells_mode(500);
			resets_mode(5);
			failures_mode(20);
			registers_mode(50);
			put_back();
		}
	} else {
		for (;;)
			;
	}
	check();
	print("end\n");
	off();
}

// What gcc makes of loops over bytes.
void *memset(void *to, int value, u64 length);
void *memset(void *to, int value, u64 length)
{
	for (u64 i = 0; i < length; i++)
		((volatile u8 *)to)[i] = value;
	return to;
}

void *memcpy(void *to, const void *from, u64 length);
void *memcpy(void *to, const void *from, u64 length)
{
	for (u64 i = 0; i < length; i++)
		((volatile u8 *)to)[i] = ((const u8 *)from)[i];
	return to;
}

u8 stack[65536] __attribute__((aligned(16), used));

__asm__(".globl _start\n_start:\n\tcld\n\tlea stack+65536(%rip), %rsp\n\tmov %rsi, %rdi\n\tcall guest\n");
