//! Whole models on the device against golden logits and against the CPU.

#[path = "../../ds4-cpu/tests/common/mod.rs"]
#[allow(dead_code)]
mod common;

use std::sync::Arc;

use common::{feed, golden, tiny_engine, tiny_file};
use ds4_cpu::Kernels;
use ds4_cuda::{CudaBackend, Error, Options};
use ds4_engine::{Engine, rows::CacheRounding};
use ds4_model::Model;

/// The small model on the device, or none where there is no device.
fn cuda_engine(rounding: CacheRounding) -> Option<Engine<CudaBackend>> {
    let model = Arc::new(Model::open(&tiny_file("tiny-b-q2.gguf")).unwrap());
    let options = Options { device: None, cache_rounding: rounding, context: 4096 };
    match CudaBackend::new(model, options, |_, _| {}) {
        Ok(backend) => Some(Engine::new(backend)),
        Err(Error::NoDriver | Error::NoDevice { .. }) => {
            eprintln!("no CUDA device: nothing was tested");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn first_tokens_equal_the_cpu() {
    for rounding in [CacheRounding::Off, CacheRounding::On] {
        let Some(engine) = cuda_engine(rounding) else { return };
        let cpu = tiny_engine(Kernels::Reference, rounding);
        let tokens = &golden("tiny-b-q2.safetensors").last().unwrap().tokens[..24].to_vec();
        for chunk in [16, 1] {
            let ours = feed(&engine, &mut engine.new_session().unwrap(), tokens, chunk);
            let theirs = feed(&cpu, &mut cpu.new_session().unwrap(), tokens, chunk);
            let worst = |(a, b): (&Vec<f32>, &Vec<f32>)| {
                a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
            };
            let worst: Vec<f32> = ours.iter().zip(&theirs).map(worst).collect();
            println!(
                "{rounding:?} chunk {chunk}: {worst:.3?} of {:.1}",
                theirs[0].iter().fold(0.0, |m: f32, x| m.max(x.abs()))
            );
        }
    }
}
