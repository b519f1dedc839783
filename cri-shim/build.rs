//! Compiles the CRI and the spans' protocol without a `protoc`.

const PROTOS: [&str; 2] = ["cri.proto", "otlp.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
