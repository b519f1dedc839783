//! A pod's loopback as the host can dial it: nothing listens in the host's half of the pod's network namespace, so what goes
//! to its loopback is redirected to listeners there. Who has them carries it to the guest's own loopback.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::process::{Command, Stdio};

use nix::sys::socket::{getsockopt, sockopt};
use tokio::net::TcpStream;

use super::{Netns, NetworkError};

/// Makes listeners, and the rules that lead to them; these end with the namespace.
pub(crate) fn redirect(netns: &Netns) -> Result<Vec<TcpListener>, NetworkError> {
    let failed = |error| NetworkError::io("redirect the pod's loopback: check that nftables is installed", error);
    netns.run(listen)?.map_err(failed)
}

fn listen() -> io::Result<Vec<TcpListener>> {
    let mut rules = String::from("table inet pericarp {\n chain output {\n  type nat hook output priority -100;\n");
    let mut listeners = Vec::new();
    for (family, address) in [("ipv4", IpAddr::from(Ipv4Addr::LOCALHOST)), ("ipv6", Ipv6Addr::LOCALHOST.into())] {
        // A host may be without IPv6.
        let Ok(listener) = TcpListener::bind(SocketAddr::new(address, 0)) else { continue };
        let port = listener.local_addr()?.port();
        listener.set_nonblocking(true)?;
        rules.push_str(&format!("  oifname \"lo\" meta nfproto {family} tcp dport != {port} redirect to :{port}\n"));
        listeners.push(listener);
    }
    rules.push_str(" }\n}\n");
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    if let Some(mut stdin) = nft.stdin.take() {
        stdin.write_all(rules.as_bytes())?;
    }
    let done = nft.wait()?;
    if done.success() { Ok(listeners) } else { Err(io::Error::other(format!("nft: {done}"))) }
}

/// The port that was dialled, which the redirection has kept (`SO_ORIGINAL_DST`).
pub(crate) fn dialled(stream: &TcpStream) -> io::Result<u16> {
    let port = match stream.local_addr()? {
        SocketAddr::V4(_) => getsockopt(stream, sockopt::OriginalDst)?.sin_port,
        SocketAddr::V6(_) => getsockopt(stream, sockopt::Ip6tOriginalDst)?.sin6_port,
    };
    Ok(u16::from_be(port))
}
