//! A bad day of the real registry: an HTTP/1.1 server before it that spoils what it serves.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where `tests/lab/registry` listens.
const REGISTRY: &str = "127.0.0.1:5000";

/// Answers larger than this are layers, which alone are spoilt.
const LAYER_BYTES: usize = 16 << 10;

/// What happens to layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// One byte is another than it was.
    Damage,
    /// Half of what is asked for comes, then the connection ends; so often, then no more.
    Break(usize),
    /// Half comes, then nothing, with the connection open.
    Stall,
}

/// The registry, seen through a fault. It listens until the test's process ends.
#[derive(Debug)]
pub struct Front {
    address: String,
    spoilt: Arc<AtomicUsize>,
}

impl Front {
    /// Puts a fault before the registry.
    pub fn start(fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("bound").to_string();
        let spoilt = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&spoilt);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let count = Arc::clone(&count);
                // A client that hangs up ends its thread and nothing else.
                std::thread::spawn(move || drop(serve(client, fault, &count)));
            }
        });
        Self { address, spoilt }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// How many answers were spoilt.
    pub fn spoilt(&self) -> usize {
        self.spoilt.load(Ordering::SeqCst)
    }
}

/// The head of a request or answer: its lines, without the empty one.
fn head(from: &mut impl BufRead) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match line.trim_end() {
            "" => return Ok(lines),
            line => lines.push(line.to_owned()),
        }
    }
}

/// Passes requests on, one connection to the registry each, as long as the client asks.
fn serve(mut client: TcpStream, fault: Fault, spoilt: &AtomicUsize) -> io::Result<()> {
    let mut from = BufReader::new(client.try_clone()?);
    loop {
        let mut request = head(&mut from)?;
        request.retain(|line| !line.to_ascii_lowercase().starts_with("connection:"));
        let mut registry = TcpStream::connect(REGISTRY)?;
        write!(registry, "{}\r\nConnection: close\r\n\r\n", request.join("\r\n"))?;
        let mut answer = BufReader::new(registry);
        let mut answered = head(&mut answer)?;
        answered.retain(|line| !line.to_ascii_lowercase().starts_with("connection:"));
        let mut body = Vec::new();
        answer.read_to_end(&mut body)?;
        write!(client, "{}\r\n\r\n", answered.join("\r\n"))?;
        if body.len() <= LAYER_BYTES || !spoils(fault, spoilt) {
            client.write_all(&body)?;
            continue;
        }
        let half = body.len() / 2;
        match fault {
            Fault::None => client.write_all(&body)?,
            Fault::Damage => {
                body[half] ^= 1;
                client.write_all(&body)?;
            }
            Fault::Break(_) => return client.write_all(&body[..half]),
            Fault::Stall => {
                client.write_all(&body[..half])?;
                // Until the client hangs up.
                io::copy(&mut from, &mut io::sink())?;
                return Ok(());
            }
        }
    }
}

/// Whether this answer is spoilt, which is then counted.
fn spoils(fault: Fault, spoilt: &AtomicUsize) -> bool {
    let most = match fault {
        Fault::None => 0,
        Fault::Break(times) => times,
        Fault::Damage | Fault::Stall => usize::MAX,
    };
    spoilt.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| (count < most).then(|| count + 1)).is_ok()
}
