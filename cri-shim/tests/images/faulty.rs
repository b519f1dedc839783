//! A registry that misbehaves on purpose: HTTP/1.1 by hand, one image, one fault.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::build::{Image, digest};

/// What happens to the first layer.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// So many bytes, then nothing, with the connection open.
    Stall(usize),
    /// So many bytes on each connection, which then ends.
    Break(usize),
    /// The manifest never ends.
    EndlessManifest,
    /// Connections are accepted and never answered.
    Silence,
}

/// Listens until the process ends; a thread per connection.
pub(crate) struct Faulty {
    /// `127.0.0.1:PORT`.
    pub(crate) address: String,
    /// Requests so far, first lines.
    pub(crate) requests: Arc<Mutex<Vec<String>>>,
}

impl Faulty {
    pub(crate) fn start(image: &Image, fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let layer = image.layers[0].packed();
        let layers: Vec<_> = image.layers.iter().map(|layer| (layer.packed(), layer.media_type(false))).collect();
        let descriptor = |bytes: &[u8], kind: &str| serde_json::json!({"mediaType": kind, "digest": digest(bytes), "size": bytes.len()});
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor(&image.config_bytes(), "application/vnd.oci.image.config.v1+json"),
            "layers": layers.iter().map(|(bytes, kind)| descriptor(bytes, kind)).collect::<Vec<_>>(),
        });
        let mut blobs: BTreeMap<String, Vec<u8>> =
            layers.into_iter().map(|(bytes, _)| (digest(&bytes), bytes)).collect();
        blobs.insert(digest(&image.config_bytes()), image.config_bytes());
        blobs.insert("latest".to_owned(), manifest.to_string().into_bytes());
        let shared = Arc::new(Served { blobs, fault, faulty: digest(&layer), requests: Arc::default() });
        let requests = Arc::clone(&shared.requests);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let served = Arc::clone(&shared);
                std::thread::spawn(move || served.serve(stream));
            }
        });
        Self { address, requests }
    }
}

struct Served {
    blobs: BTreeMap<String, Vec<u8>>,
    fault: Fault,
    faulty: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Served {
    fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        loop {
            let (mut first, mut from) = (String::new(), 0);
            if reader.read_line(&mut first).ok()? == 0 {
                return None;
            }
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).ok()?;
                if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                    from = range.trim().trim_end_matches('-').parse().ok()?;
                }
                if line.trim().is_empty() {
                    break;
                }
            }
            self.requests.lock().ok()?.push(first.trim().to_owned());
            if self.fault == Fault::Silence {
                wait_for_end(&mut reader);
                return None;
            }
            let name = first.split(' ').nth(1)?.rsplit('/').next()?;
            let Some(body) = self.blobs.get(name) else {
                stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").ok()?;
                continue;
            };
            let body = body.get(from..)?;
            let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
            let limit = match self.fault {
                Fault::Stall(limit) | Fault::Break(limit) if name == self.faulty => limit.min(body.len()),
                Fault::EndlessManifest if name == "latest" => {
                    write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n").ok()?;
                    loop {
                        stream.write_all(&[b' '; 1 << 16]).ok()?;
                    }
                }
                _ => body.len(),
            };
            write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len()).ok()?;
            stream.write_all(&body[..limit]).ok()?;
            if limit < body.len() {
                if let Fault::Stall(_) = self.fault {
                    wait_for_end(&mut reader);
                }
                return None;
            }
        }
    }
}

/// Until the client hangs up.
fn wait_for_end(reader: &mut impl Read) {
    let _hung_up = std::io::copy(reader, &mut std::io::sink());
}
