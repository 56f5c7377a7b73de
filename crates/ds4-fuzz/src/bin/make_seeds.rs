//! Writes the seeds to a folder, one folder inside for each target: `make_seeds FOLDER`.

use std::{env, fs, io, path::Path};

fn main() -> io::Result<()> {
    let Some(folder) = env::args().nth(1) else {
        return Err(io::Error::other("usage: make_seeds FOLDER"));
    };
    for seed in ds4_fuzz::seeds::all() {
        let folder = Path::new(&folder).join(seed.target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(seed.name), seed.bytes)?;
    }
    Ok(())
}
