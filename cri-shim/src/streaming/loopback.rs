//! Port-forwarding as containerd does it: it dials a port of localhost in the pod's network namespace on the host. What the
//! core has redirected there is carried to the guest's own loopback.

use std::path::PathBuf;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::agent::SessionOutput;
use crate::error::{Error, IoContext, Result};
use crate::network::{Netns, loopback};
use crate::pod::Pods;

/// Bytes carried at once.
const CHUNK_BYTES: usize = 32 << 10;

/// Begins to forward what is dialled in a pod's namespace, as long as this process lives.
pub(crate) async fn forward(pods: &Pods, pod: &str, netns: PathBuf) -> Result<()> {
    let made = tokio::task::spawn_blocking(move || loopback::redirect(&Netns::at(netns))).await;
    let failed = |error: &dyn std::fmt::Display| Error::Internal(format!("forwarding ports: {error}"));
    for listener in made.map_err(|error| failed(&error))?.map_err(|error| failed(&error))? {
        let listener = TcpListener::from_std(listener).doing(|| "listening for forwarded ports")?;
        tokio::spawn(accept(pods.clone(), pod.to_owned(), listener));
    }
    Ok(())
}

async fn accept(pods: Pods, pod: String, listener: TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        let (pods, pod) = (pods.clone(), pod.clone());
        tokio::spawn(async move {
            if let Err(error) = carry(&pods, &pod, stream).await {
                tracing::debug!(%error, "a forwarded connection has ended");
            }
        });
    }
}

/// Carries one connection, until both directions have ended.
async fn carry(pods: &Pods, pod: &str, mut stream: TcpStream) -> Result<()> {
    let port = loopback::dialled(&stream).doing(|| "finding the port that was dialled")?;
    let (mut output, mut input) = pods.port_forward(pod, port).await?.split();
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
