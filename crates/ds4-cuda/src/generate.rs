//! Tensors of models without a file, made on the device by the generator that the CPU uses too.

use ds4_engine::backend::{BackendError, StageResult};
use ds4_model::synth::{Content, Generator};
use gguf::TensorType;

use crate::arguments::args;
use crate::device::{Buffer, Device};

const THREADS: usize = 256;
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
            let id = match ty {
                TensorType::F32 => 0u32,
                TensorType::F16 => 1,
                _ => 30,
            };
            device.launch(
                "generate_floats",
                blocks(bytes / element),
                THREADS,
                0,
                args![
                    out.pointer(),
                    (start / element) as u64,
                    (bytes / element) as u64,
                    generator.key(),
                    id,
                    *middle,
                    *half_step
                ],
            )
        }
        Content::Blocks(scales) => {
            let choices: Vec<u32> = scales.choices.iter().map(|c| u32::from_le_bytes(*c)).collect();
            let choices = device.buffer(&choices)?;
            device.launch(
                "generate_blocks",
                blocks(bytes.div_ceil(size_of::<u64>())),
                THREADS,
                0,
                args![
                    out.pointer(),
                    start as u64,
                    bytes as u64,
                    generator.key(),
                    ty.block_bytes(),
                    scales.at,
                    scales.size,
                    choices.pointer()
                ],
            )
        }
        Content::ExpertIds { .. } => {
            Err(BackendError::Device("tables of experts are made on the host".to_owned()))
        }
    }
}

fn blocks(items: usize) -> [usize; 3] {
    [items.div_ceil(THREADS).clamp(1, MOST_BLOCKS), 1, 1]
}

#[cfg(test)]
mod tests {
    use ds4_model::{
        binding::{Binding, Slot},
        synth,
    };

    use super::*;
    use crate::Error;

    #[test]
    fn the_device_makes_the_bytes_of_the_cpu() {
        let device = match Device::open(0) {
            Ok(device) => device,
            Err(Error::NoDriver | Error::NoCompiler) => {
                return eprintln!("no CUDA device: nothing was tested");
            }
            Err(error) => panic!("{error}"),
        };
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
