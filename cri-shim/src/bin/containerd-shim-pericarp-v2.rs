//! containerd's shim, which containerd starts by itself.

use std::process::ExitCode;

fn main() -> ExitCode {
    cri_shim::shim::main()
}
