//! Writes a checkpoint with official names, FP8 and FP4 storage and random values, for trying
//! conversions at full width without a download:
//!
//!     cargo run --release -p ds4-convert --example checkpoint -- DIR [LAYERS [EXPERTS]]
//!
//! Layers have Flash's widths. At 16 experts one takes 0.3 GB, at 256 experts 3.5 GB.

#[allow(dead_code, missing_docs, reason = "shared with tests, which use more of it")]
#[path = "../tests/conversion/generate.rs"]
mod generate;

use std::{env, fs, path::PathBuf};

fn main() {
    let mut args = env::args_os().skip(1);
    let directory = PathBuf::from(args.next().expect("expected DIR [LAYERS [EXPERTS]]"));
    let mut number =
        |default| args.next().map_or(default, |a| a.to_str().unwrap().parse().unwrap());
    let (layers, experts): (u32, u32) = (number(3), number(16));
    fs::create_dir_all(&directory).unwrap();
    let ratios: Vec<u32> = [0, 4, 128].into_iter().cycle().take(layers as usize).collect();
    let config = generate::config(&ratios, 1, 4096, experts);
    let metadata = generate::describe(&directory, &config);
    let tensors = generate::tensors(metadata.config());
    generate::write(&directory.join("model.safetensors"), &tensors);
    println!("{}: {} tensors", directory.display(), tensors.len());
}
