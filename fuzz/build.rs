//! Compiles the wire's headers, as the server's build script does.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=../proto/freetumor.proto");
    let files = protox::compile(["freetumor.proto"], ["../proto"])?;
    prost_build::Config::new().btree_map(["."]).compile_fds(files)?;
    Ok(())
}
