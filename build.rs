//! Compiles `proto/freetumor.proto` in pure Rust, so that no `protoc` is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/freetumor.proto");
    let files = protox::compile(["freetumor.proto"], ["proto"])?;
    // Ordered maps: a hash map's order would make equal headers differ in bytes.
    prost_build::Config::new().btree_map(["."]).compile_fds(files)?;
    Ok(())
}
