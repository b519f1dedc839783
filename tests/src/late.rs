//! A call whose client sets a deadline and then leaves it to the server: gRPC libraries end such calls themselves.

use std::path::Path;
use std::time::Duration;

use http::Request;
use tokio::net::UnixStream;
use tonic::Status;

/// Makes a call with a deadline, and returns the status that the server gave it.
///
/// `method` is such as `runtime.v1.RuntimeService/Version`.
pub fn status_of(socket: &Path, method: &str, message: &impl prost::Message, deadline: Duration) -> Status {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(call(socket, method, frame(message), deadline))
}

/// gRPC over HTTP/2, `Length-Prefixed-Message`: not compressed, length, message.
fn frame(message: &impl prost::Message) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    let length = u32::try_from(bytes.len()).expect("a short message");
    [&[0], length.to_be_bytes().as_slice(), &bytes].concat()
}

async fn call(socket: &Path, method: &str, frame: Vec<u8>, deadline: Duration) -> Status {
    let stream = UnixStream::connect(socket).await.expect("the daemon listens");
    let (client, connection) = h2::client::handshake(stream).await.expect("the daemon speaks HTTP/2");
    tokio::spawn(connection);
    let request = Request::post(format!("http://localhost/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", format!("{}m", deadline.as_millis()))
        .body(())
        .expect("a request");
    let mut client = client.ready().await.expect("the daemon takes calls");
    let (answer, mut body) = client.send_request(request, false).expect("the daemon takes calls");
    body.send_data(frame.into(), true).expect("the daemon takes messages");
    let answer = answer.await.expect("an answer");
    // A call that fails may end with its head; one that has an answer has its status behind it.
    if let Some(status) = Status::from_header_map(answer.headers()) {
        return status;
    }
    let mut body = answer.into_body();
    while let Some(bytes) = body.data().await {
        let bytes = bytes.expect("an answer in whole").len();
        body.flow_control().release_capacity(bytes).expect("what has come");
    }
    let trailers = body.trailers().await.expect("an answer in whole").expect("trailers");
    Status::from_header_map(&trailers).expect("a status")
}
