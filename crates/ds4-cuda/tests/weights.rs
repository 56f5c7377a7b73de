//! Models in every type of weights, and of full widths, on the device against the plain CPU path.

mod support;

use std::{fs::File, io::BufWriter, ops::ControlFlow, path::Path, sync::Arc};

use ds4_convert::{ModelMetadata, Options, Plan, Source, convert};
use ds4_engine::rows::CacheRounding;
use ds4_model::{
    Model,
    config::{Config, LayerKind},
    synth::{self, Recipe},
    weights::Routing,
};
use gguf::GgufFile;
use support::{Difference, cpu, cuda, feed, small_model};

/// Prompt and decoded tokens of `model` on the device against the CPU. Activations rounded to
/// halves cost a divergence of some 1e-6, and 1e-2 at a position where another expert is chosen.
fn compare(name: &str, model: &Arc<Model>, prompt: usize, decoded: usize) {
    let engine = cuda(model, CacheRounding::Off);
    let cpu = cpu(model, CacheRounding::Off);
    let mut random = fastrand::Rng::with_seed(prompt as u64);
    let vocab = model.config.vocab as u32;
    let tokens: Vec<u32> = (0..prompt + decoded).map(|_| random.u32(0..vocab)).collect();
    let (mut ours, mut theirs) = (engine.new_session().unwrap(), cpu.new_session().unwrap());
    for (what, tokens, chunk) in
        [("prompt", &tokens[..prompt], prompt), ("decoded", &tokens[prompt..], 1)]
    {
        let found = feed(&engine, &mut ours, tokens, chunk);
        let d = Difference::of(&found, &feed(&cpu, &mut theirs, tokens, chunk));
        println!("{name}, {what}: {d:?}");
        // One flipped choice of an expert moves random models that far.
        assert!(d.kl <= 5e-2 && d.top1 >= 0.85, "{name}, {what}: {d:?}");
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn every_recipe() {
    for &recipe in Recipe::ALL {
        compare(recipe.name(), &small_model(recipe), 70, 4);
    }
}

/// A file may list an expert twice for a token; it then counts twice.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn experts_that_tokens_use_twice() {
    let mut model = small_model(Recipe::Q2);
    let used = model.config.experts_used;
    let layers = &mut Arc::get_mut(&mut model).unwrap().weights.layers;
    let tables = layers.iter_mut().filter_map(|layer| match &mut layer.ffn.routing {
        Routing::Hash(table) => Some(table),
        Routing::Bias(_) => None,
    });
    let changed = tables.map(|table| table.chunks_exact_mut(used).for_each(|ids| ids[1] = ids[0]));
    assert!(changed.count() > 0);
    compare("experts twice", &model, 5, 40);
}

/// One type for all matrices that can have it; and types that no recipe has where matrices are
/// computed exactly.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn every_type_in_every_place() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("f32.gguf");
    write_f32(&source);
    for (ty, exact) in [
        ("F32", "BF16"),
        ("F16", "F32"),
        ("BF16", "Q8_0"),
        ("Q8_0", "Q4_K"),
        ("Q2_K", "Q2_K"),
        ("Q4_K", "MXFP4"),
        ("IQ2_XXS", "IQ2_XXS"),
        ("MXFP4", "F16"),
    ] {
        let places = ["*attn_q_a", "*attn_q_b", "*attn_kv", "*attn_output_?", "*exps", "*shexp"];
        let places = places.map(|place| format!("{place}.weight={ty}").replace('?', "*"));
        let others = ["output", "token_embd", "*ffn_gate_inp", "*compressor_kv"];
        let others = others.map(|place| format!("{place}.weight={exact}"));
        let more = ["*compressor_gate", "*indexer.proj", "*indexer.attn_q_b", "*hc_*_fn"];
        let more = more.map(|place| format!("{place}.weight={exact}"));
        let overrides = places.iter().chain(&others).chain(&more);
        let overrides = overrides.map(|text| text.parse().unwrap()).collect();
        let file = directory.path().join(format!("{ty}.gguf"));
        let options = Options { recipe: Recipe::F32, overrides, importance: None };
        let plan = plan(&source, options);
        convert(&plan, &file, |_| ControlFlow::Continue(())).unwrap();
        let model = Arc::new(Model::open(&file).unwrap());
        assert_eq!(model.weights.layers[0].attn.q_b.ty.name(), ty);
        compare(&format!("{ty} and {exact}"), &model, 20, 4);
    }
}

/// Rows of every matrix are whole blocks of every type.
fn write_f32(path: &Path) {
    let config = Config { context_length: 4096, q_rank: 256, output_rank: 128, ..synth::tiny() };
    let file = BufWriter::new(File::create(path).unwrap());
    synth::write(&config, Recipe::F32, 3, file, |_| {}).unwrap();
}

fn plan(source: &Path, options: Options) -> Plan {
    let metadata = ModelMetadata::from_gguf(&GgufFile::open(source).unwrap()).unwrap();
    let source = Source::open(&[source.to_owned()]).unwrap();
    Plan::new("out.gguf", &source, &metadata, options).unwrap()
}

/// All widths of the full model but for the number of experts and tokens.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn full_widths() {
    let flash = synth::flash(4);
    let layers = flash.layers.iter().filter(|layer| layer.kind != LayerKind::Swa).cloned();
    let config = Config {
        layers: layers.collect(),
        vocab: 1024,
        experts: 8,
        context_length: 1024,
        ..flash.clone()
    };
    let model = Arc::new(Model::dummy("wide", &config, Recipe::Q2, 1).unwrap());
    compare("full widths", &model, 9, 2);
}

/// Tests that take minutes and much memory on the emulator.
mod on_a_gpu {
    use super::*;

    /// The real thing, four layers of it.
    #[test]
    #[ignore = "needs a CUDA device that is a GPU"]
    fn four_layers_of_the_full_model() {
        for recipe in [Recipe::Q2, Recipe::Q4, Recipe::Mxfp4] {
            let name = format!("four layers, {}", recipe.name());
            let model = Arc::new(Model::dummy(&name, &synth::flash(4), recipe, 1).unwrap());
            compare(&name, &model, 48, 8);
        }
    }
}
