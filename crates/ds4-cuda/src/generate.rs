//! Tensors of models without a file, made on the device by the generator that the CPU uses too.

#![allow(unsafe_code, reason = "launches kernels")]

use ds4_engine::backend::{BackendError, StageResult};
use ds4_model::synth::{Content, Generator};

use crate::{
    constants::{GENERATE_THREADS, SCALE_CHOICES},
    device::{Buffer, Device, Grid},
    params::{GENERATE_BLOCKS, GENERATE_FLOATS, GenerateBlocksParams, GenerateFloatsParams},
};

/// Enough to fill any device; threads take several numbers or words each where there are more.
const MOST_BLOCKS: usize = 4096;

/// Writes bytes `start` to `start + bytes` of what `generator` makes to the beginning of `out`;
/// `start` is a multiple of [`Generator::piece_bytes`].
pub(crate) fn generate(
    device: &Device,
    generator: &Generator,
    start: usize,
    bytes: usize,
    out: &Buffer<u8>,
) -> StageResult {
    let ty = generator.ty();
    match generator.content() {
        Content::Floats { middle, half_step } => {
            let element = ty.block_bytes();
            let params = GenerateFloatsParams {
                out: out.first(bytes),
                first: (start / element) as u64,
                count: (bytes / element) as u64,
                key: generator.key(),
                ty: ty.id(),
                middle: *middle,
                half_step: *half_step,
            };
            // SAFETY: the buffer has that many bytes.
            unsafe { device.launch(GENERATE_FLOATS, grid(bytes / element), &params) }
        }
        Content::Blocks(scales) => {
            let choices: Vec<u32> = scales.choices.iter().map(|c| u32::from_le_bytes(*c)).collect();
            let choices = device.buffer(&choices)?;
            let params = GenerateBlocksParams {
                out: out.first(bytes),
                choices: choices.first(SCALE_CHOICES),
                first: start as u64,
                bytes: bytes as u64,
                key: generator.key(),
                block_bytes: ty.block_bytes() as u32,
                scale_at: scales.at as u32,
                scale_bytes: scales.size as u32,
            };
            // SAFETY: the buffers have that many bytes and choices.
            unsafe {
                device.launch(GENERATE_BLOCKS, grid(bytes.div_ceil(size_of::<u64>())), &params)
            }
        }
        Content::ExpertIds { .. } => {
            Err(BackendError::Device("tables of experts are made on the host".to_owned()))
        }
    }
}

fn grid(items: usize) -> Grid {
    let blocks = items.div_ceil(GENERATE_THREADS).clamp(1, MOST_BLOCKS);
    Grid { blocks: [blocks, 1, 1], threads: GENERATE_THREADS, shared: 0 }
}

#[cfg(test)]
mod tests {
    use ds4_model::{
        binding::{Binding, Slot},
        synth,
    };

    use super::*;

    #[test]
    #[ignore = "needs a CUDA device or the emulator"]
    fn the_device_makes_the_bytes_of_the_cpu() {
        let device = Device::open(0).unwrap_or_else(|error| panic!("{error}"));
        let config = synth::tiny();
        let expected = Binding::of(Slot::ExpertGate).expected(&config, Some(1));
        for ty in expected.binding.role.types() {
            let generator = Generator::new(&config, &expected, *ty, 9).unwrap();
            let later = 3 * generator.piece_bytes(1000);
            // The whole, the rest from some place on, and blocks that end inside a word.
            for (start, bytes) in [
                (0, generator.bytes()),
                (later, generator.bytes() - later),
                (later, 5 * ty.block_bytes()),
            ] {
                let out = device.buffer(&vec![0u8; bytes + 8]).unwrap();
                generate(&device, &generator, start, bytes, &out).unwrap();
                let found = device.download(&out, 0..bytes + 8).unwrap();
                let mut cpu = vec![0; bytes + 8];
                generator.fill(start, &mut cpu[..bytes]);
                assert!(found == cpu, "{ty} from {start}, {bytes} bytes");
            }
        }
    }
}
