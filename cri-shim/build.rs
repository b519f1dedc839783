//! Compiles the CRI and the spans' protocol without a `protoc`, and has the linker pack the programs' twenty thousand relocations
//! into a few pages.

const PROTOS: [&str; 2] = ["cri.proto", "otlp.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
