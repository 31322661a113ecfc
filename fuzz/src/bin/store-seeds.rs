//! Writes what the store's fuzzer starts from into the folder that is its only argument.

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).ok_or(std::io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(&folder)?;
    for (name, bytes) in freetumor_fuzz::store_seeds() {
        std::fs::write(std::path::Path::new(&folder).join(name), bytes)?;
    }
    Ok(())
}
