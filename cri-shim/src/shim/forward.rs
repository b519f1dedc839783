//! Port-forwarding as containerd does it: it dials a port of localhost in the pod's network namespace on the host, where
//! nothing listens. What goes there is redirected to a listener of the shim's, and from it to the guest's own loopback.

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::socket::{getsockopt, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::agent::SessionOutput;
use crate::error::{Error, IoContext, Result};
use crate::network::Netns;
use crate::pod::Pods;

/// Bytes carried at once.
const CHUNK_BYTES: usize = 32 << 10;

/// Begins to forward what is dialled in a pod's namespace. It ends with this process, and the rules with the namespace.
pub(super) async fn start(pods: &Pods, pod: &str, netns: &Path) -> Result<()> {
    let netns = Netns::at(netns.to_owned());
    let made = tokio::task::spawn_blocking(move || netns.run(prepare)).await;
    let failed = |error: &dyn std::fmt::Display| Error::Internal(format!("forwarding ports: {error}"));
    let listeners = made.map_err(|error| failed(&error))?.map_err(|error| failed(&error))??;
    for listener in listeners {
        let listener = tokio::net::TcpListener::from_std(listener).doing(|| "listening for forwarded ports")?;
        tokio::spawn(accept(pods.clone(), pod.to_owned(), listener));
    }
    Ok(())
}

/// Within the namespace: listeners, and the rules that lead to them.
fn prepare() -> Result<Vec<TcpListener>> {
    let mut rules = String::from("table inet pericarp {\n chain output {\n  type nat hook output priority -100;\n");
    let mut listeners = Vec::new();
    for (family, address) in [("ipv4", Ipv4Addr::LOCALHOST.into()), ("ipv6", Ipv6Addr::LOCALHOST.into())] {
        // A host may be without IPv6.
        let Ok(listener) = TcpListener::bind(SocketAddr::new(address, 0)) else { continue };
        let port = listener.local_addr().doing(|| "listening for forwarded ports")?.port();
        listener.set_nonblocking(true).doing(|| "listening for forwarded ports")?;
        rules.push_str(&format!("  oifname \"lo\" meta nfproto {family} tcp dport != {port} redirect to :{port}\n"));
        listeners.push(listener);
    }
    rules.push_str(" }\n}\n");
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
    let nft = nft.as_mut().map_err(|error| Error::Unavailable(format!("nft: {error}: install nftables")))?;
    if let Some(mut stdin) = nft.stdin.take() {
        stdin.write_all(rules.as_bytes()).doing(|| "telling nft its rules")?;
    }
    let done = nft.wait().doing(|| "waiting for nft")?;
    if done.success() { Ok(listeners) } else { Err(Error::Internal(format!("nft: {done}"))) }
}

async fn accept(pods: Pods, pod: String, listener: tokio::net::TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        let (pods, pod) = (pods.clone(), pod.clone());
        tokio::spawn(async move {
            if let Err(error) = forward(&pods, &pod, stream).await {
                tracing::debug!(%error, "a forwarded connection has ended");
            }
        });
    }
}

/// Carries one connection, until both directions have ended.
async fn forward(pods: &Pods, pod: &str, mut stream: TcpStream) -> Result<()> {
    let session = pods.port_forward(pod, dialled(&stream)?).await?;
    let (mut output, mut input) = session.split();
    let (mut from, mut to) = stream.split();
    let sending = async {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            match from.read(&mut chunk).await.doing(|| "reading")? {
                0 => break input.close_stdin().await?,
                count => input.write(chunk.get(..count).unwrap_or_default()).await?,
            }
        }
        // The session ends when its writer is dropped.
        std::future::pending::<Result<()>>().await
    };
    let receiving = async {
        loop {
            match output.next().await? {
                SessionOutput::Stdout(bytes) => to.write_all(&bytes).await.doing(|| "writing")?,
                SessionOutput::Stderr(_) => {}
                SessionOutput::Exit(_) => return to.shutdown().await.doing(|| "ending"),
            }
        }
    };
    tokio::select! {
        sent = sending => sent,
        received = receiving => received,
    }
}

/// The port that was meant, which the redirection has kept (`SO_ORIGINAL_DST`).
fn dialled(stream: &TcpStream) -> Result<u16> {
    let doing = || "finding the port that was dialled";
    let port = match stream.local_addr().doing(doing)? {
        SocketAddr::V4(_) => getsockopt(stream, sockopt::OriginalDst).doing(doing)?.sin_port,
        SocketAddr::V6(_) => getsockopt(stream, sockopt::Ip6tOriginalDst).doing(doing)?.sin6_port,
    };
    Ok(u16::from_be(port))
}
