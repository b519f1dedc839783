//! The first line of a client: `CONNECT <port>\n`.

use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg};

use super::packet::PORT_ANY;

/// Most bytes of the line: `CONNECT 4294967295\n` and some.
const LINE_BYTES: usize = 32;

/// A client that has not said yet where it wants to go.
#[derive(Debug)]
pub(super) struct Handshake {
    /// The client.
    pub(super) stream: UnixStream,
    line: Vec<u8>,
}

/// What came of reading on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The line is not complete.
    Waiting,
    /// The client asks for this port of the guest.
    Port(u32),
    /// The client is gone or does not speak the protocol.
    Refused,
}

impl Handshake {
    /// `stream` is non-blocking.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::new() }
    }

    /// Reads on, up to the line's end and not a byte further: what follows belongs to the guest.
    pub(super) fn advance(&mut self) -> Progress {
        match self.read() {
            Ok(progress) => progress,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Progress::Waiting,
            Err(_) => Progress::Refused,
        }
    }

    fn read(&mut self) -> io::Result<Progress> {
        let mut bytes = [0; LINE_BYTES];
        let seen = self.receive(&mut bytes, MsgFlags::MSG_PEEK)?;
        let seen = bytes.get(..seen).unwrap_or_default();
        let end = seen.iter().position(|byte| *byte == b'\n');
        let wanted = end.map_or(seen.len(), |end| end.saturating_add(1));
        let taken = self.receive(bytes.get_mut(..wanted).unwrap_or_default(), MsgFlags::empty())?;
        self.line.extend(bytes.iter().take(taken));
        if taken == 0 || self.line.len() > LINE_BYTES {
            return Ok(Progress::Refused);
        }
        Ok(if end.is_some() { parse(&self.line).map_or(Progress::Refused, Progress::Port) } else { Progress::Waiting })
    }

    fn receive(&self, bytes: &mut [u8], flags: MsgFlags) -> io::Result<usize> {
        loop {
            match recvmsg::<()>(self.stream.as_raw_fd(), &mut [IoSliceMut::new(bytes)], None, flags) {
                Err(Errno::EINTR) => {}
                result => return Ok(result?.bytes),
            }
        }
    }
}

/// The port in a whole line.
fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    // `parse` alone would take a plus sign too.
    let digits = str::from_utf8(digits).ok().filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))?;
    digits.parse().ok().filter(|port| *port != PORT_ANY)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;

    use super::*;

    fn pair() -> (Handshake, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Handshake::new(ours), theirs)
    }

    fn said(text: &[u8]) -> Progress {
        let (mut handshake, mut client) = pair();
        client.write_all(text).unwrap();
        handshake.advance()
    }

    #[test]
    fn a_port_is_a_decimal_number() {
        assert_eq!(said(b"CONNECT 1024\n"), Progress::Port(1024));
        assert_eq!(said(b"CONNECT 4294967294\n"), Progress::Port(4_294_967_294));
        let bad: [&[u8]; 10] = [
            b"\n",
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT +5\n",
            b"CONNECT -5\n",
            b"CONNECT 5 \n",
            b"connect 5\n",
            b"CONNECT 4294967295\n",
            b"CONNECT 4294967296\n",
            b"CONNECT \xff\n",
        ];
        for text in bad {
            assert_eq!(said(text), Progress::Refused, "{text:?}");
        }
    }

    #[test]
    fn the_line_may_come_in_pieces_and_what_follows_it_stays() {
        let (mut handshake, mut client) = pair();
        assert_eq!(handshake.advance(), Progress::Waiting);
        for piece in [&b"CON"[..], b"NECT 5"] {
            client.write_all(piece).unwrap();
            assert_eq!(handshake.advance(), Progress::Waiting);
        }
        client.write_all(b"2\nhello").unwrap();
        assert_eq!(handshake.advance(), Progress::Port(52));
        let mut rest = [0; 5];
        handshake.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn an_endless_line_is_cut_short() {
        let (mut handshake, mut client) = pair();
        client.write_all(&[b'C'; 1000]).unwrap();
        assert_eq!(handshake.advance(), Progress::Waiting);
        assert_eq!(handshake.advance(), Progress::Refused);
    }

    #[test]
    fn a_client_that_leaves_is_let_go() {
        let (mut handshake, client) = pair();
        drop(client);
        assert_eq!(handshake.advance(), Progress::Refused);
    }

    proptest! {
        #[test]
        fn any_line_is_survived(text in prop::collection::vec(any::<u8>(), 0..64)) {
            let _port = parse(&text);
        }
    }
}
