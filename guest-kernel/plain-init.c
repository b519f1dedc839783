// PID 1 of the plain comparison guest: one line on the console, then nothing. A 'q' typed there reboots, which ends the VMM.
#include <sys/reboot.h>
#include <unistd.h>

static const char line[] = "HELLO-FROM-GUEST\n";

int main(void)
{
	char key;

	if (write(STDOUT_FILENO, line, sizeof line - 1) < 0)
		return 1;
	for (;;) {
		if (read(STDIN_FILENO, &key, 1) <= 0)
			pause();
		else if (key == 'q')
			reboot(RB_AUTOBOOT);
	}
}
