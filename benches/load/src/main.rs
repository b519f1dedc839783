//! Work for the I/O benchmarks: the init of a guest whose devices are measured, and the same program on the host.
//!
//! It takes one job a line on its standard input, says `ready` when everything for it is open, waits for a line, does it and
//! says `done`. So whoever counts sees the work alone. It measures nothing itself.
//!
//! | job | work |
//! |---|---|
//! | `disk read\|write random\|sequential BYTES THREADS COUNT` | so many accesses of so many bytes, past the page cache, by so many threads |
//! | `send\|receive PORT MIB` | a TCP stream to or from the peer; the peer says when it has all |
//! | `burst-send\|burst-receive PORT COUNT` | UDP packets in bursts, each burst answered by one packet |
//! | `echo PORT COUNT` | one byte to the peer and back, by TCP |
//! | `vsock-send\|vsock-receive PORT MIB` | as `send` and `receive`, to a peer that dials |
//! | `memory-take MIB`, `memory-give MIB` | memory, each page of it touched; all that was taken before given up |
//! | `nothing` | what a job costs that has no work |

mod disk;
mod guest;
mod memory;
mod net;

use std::io::{self, BufRead, Write};
use std::rc::Rc;

use anyhow::{Context, Result, bail};

fn main() -> Result<()> {
    if std::process::id() == 1 {
        guest::set_up()?;
    }
    let mut lines = io::stdin().lock().lines();
    let held = memory::Held::default();
    say("hello")?;
    while let Some(line) = lines.next() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let work = prepare(&words, &held).with_context(|| format!("preparing {line}"))?;
        say("ready")?;
        lines.next().context("nobody says when to begin")??;
        work().with_context(|| line.clone())?;
        say("done")?;
    }
    Ok(())
}

/// What is left of a job when everything is open.
type Work = Box<dyn FnOnce() -> Result<()>>;

fn prepare(words: &[&str], held: &memory::Held) -> Result<Work> {
    let held = Rc::clone(held);
    Ok(match *words {
        ["nothing"] => Box::new(|| Ok(())),
        ["disk", kind, order, bytes, threads, count] => {
            let access = disk::Access { write: kind == "write", random: order == "random", bytes: bytes.parse()? };
            let work = disk::Disk::open(access, threads.parse()?, count.parse()?)?;
            Box::new(|| work.run())
        }
        ["send", port, mib] => {
            let (stream, mib) = (net::connect(port)?, mib.parse()?);
            Box::new(move || net::send(stream, mib))
        }
        ["receive", port, mib] => {
            let (stream, mib) = (net::connect(port)?, mib.parse()?);
            Box::new(move || net::receive(stream, mib))
        }
        ["burst-send", port, count] => {
            let (socket, count) = (net::datagrams(port)?, count.parse()?);
            Box::new(move || net::burst_send(&socket, count))
        }
        ["burst-receive", port, count] => {
            let (socket, count) = (net::datagrams(port)?, count.parse()?);
            Box::new(move || net::burst_receive(&socket, count))
        }
        ["echo", port, count] => {
            let (stream, count) = (net::connect(port)?, count.parse()?);
            Box::new(move || net::echo(stream, count))
        }
        ["vsock-send", port, mib] => {
            let (stream, mib) = (net::vsock(port.parse()?)?, mib.parse()?);
            Box::new(move || net::send(stream, mib))
        }
        ["vsock-receive", port, mib] => {
            let (stream, mib) = (net::vsock(port.parse()?)?, mib.parse()?);
            Box::new(move || net::receive(stream, mib))
        }
        ["memory-take", mib] => {
            if std::process::id() == 1 {
                memory::find_devices()?;
            }
            let mib = mib.parse()?;
            Box::new(move || {
                memory::take(&held, mib);
                Ok(())
            })
        }
        ["memory-give", _] => Box::new(move || {
            memory::give(&held);
            Ok(())
        }),
        _ => bail!("no such job"),
    })
}

fn say(word: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{word}")?;
    out.flush()
}
