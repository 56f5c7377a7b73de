//! `ds4 inspect`: what a model file holds, and the memory it needs.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    sync::Arc,
};

use anyhow::{Result, ensure};
use clap::Args;
use ds4_cpu::{Activations, PREFILL_CHUNK};
use ds4_engine::{layout::StateLayout, rows::CacheRounding};
use ds4_model::{
    Model,
    binding::{Role, expected_tensors},
    config::{Config, LayerKind},
};
use ds4_text::profile::Profile;
use gguf::{GgufFile, TensorInfo};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    memory,
    model::ModelArgs,
    terminal::{bytes, printable},
};

/// Options of `ds4 inspect`.
#[derive(Args)]
pub struct InspectArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Context to compute the memory for, in tokens
    #[arg(long, value_name = "N", default_value = "32768")]
    ctx: usize,
    /// List every tensor too
    #[arg(long)]
    tensors: bool,
    /// List every metadata entry too
    #[arg(long)]
    metadata: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Tensors of one role and type.
#[derive(Serialize)]
struct Group {
    role: &'static str,
    #[serde(rename = "type")]
    ty: &'static str,
    tensors: usize,
    bytes: u64,
}

/// Bytes that running the model takes.
#[derive(Serialize)]
struct Memory {
    context: usize,
    /// Mapped from the file: the system may drop pages and read them again.
    weights: u64,
    kv_state: u64,
    /// Of a prompt's chunk.
    activations: u64,
}

/// Prints the description.
pub fn run(args: &InspectArgs) -> Result<()> {
    let model = args.model.open()?;
    let limit = model.config.context_length;
    ensure!(
        args.ctx <= limit,
        "--ctx: found {}, expected at most {limit}, the model's longest context",
        args.ctx
    );
    let memory = Memory {
        context: args.ctx,
        weights: model.file_bytes(),
        kv_state: StateLayout::new(&model.config, CacheRounding::On).bytes(args.ctx),
        activations: Activations::bytes(&model.config, PREFILL_CHUNK.min(args.ctx)),
    };
    let groups = groups(&model);
    if args.json {
        let mut description = describe(&model, &groups, &memory);
        if args.tensors {
            description["tensors"] = model_tensors(&model).map(tensor_json).collect();
        }
        if args.metadata {
            let entries = model.metadata().iter();
            description["metadata"] =
                entries.map(|(key, value)| (key, value.to_string())).collect();
        }
        return Ok(writeln!(io::stdout(), "{description:#}")?);
    }
    let mut text = summary(&model);
    text += &groups_table(&groups);
    text += &memory_table(&memory);
    if args.metadata {
        text += &metadata_table(&model);
    }
    if args.tensors {
        text += &tensor_table(&model);
    }
    Ok(io::stdout().write_all(printable(&text).as_bytes())?)
}

fn groups(model: &Model) -> Vec<Group> {
    let mut groups: BTreeMap<(Role, u32), Group> = BTreeMap::new();
    for tensor in expected_tensors(&model.config) {
        let info = model.files().iter().find_map(|file| file.tensor(&tensor.name));
        let Some(info) = info else { continue };
        let role = tensor.binding.role;
        let empty = || Group { role: role.name(), ty: info.ty.name(), tensors: 0, bytes: 0 };
        let group = groups.entry((role, info.ty.id())).or_insert_with(empty);
        group.tensors += 1;
        group.bytes += info.range.len() as u64;
    }
    groups.into_values().collect()
}

fn model_tensors(model: &Model) -> impl Iterator<Item = &TensorInfo> {
    model.files().iter().flat_map(|file| file.tensors())
}

fn summary(model: &Model) -> String {
    let config = &model.config;
    let mut text = String::new();
    let mut line = |name: &str, value: String| text += &format!("{name:<14}{value}\n");
    line("name", name(model).to_owned());
    for file in model.files() {
        line("file", format!("{} ({})", file.name(), bytes(file.file_bytes())));
    }
    line("architecture", "DeepSeek V4 (deepseek4)".to_owned());
    line("layers", layers(config));
    line("schedule", schedule(config));
    line(
        "width",
        format!(
            "{} (4 streams), {} heads, query rank {}, {} output groups of rank {}",
            config.hidden, config.heads, config.q_rank, config.output_groups, config.output_rank
        ),
    );
    line(
        "experts",
        format!(
            "{} routed and 1 shared of width {}, {} routed used per token",
            config.experts, config.expert_width, config.experts_used
        ),
    );
    line("indexer", format!("{} heads, best {} rows", config.index_heads, config.index_top_k));
    line("vocabulary", format!("{} tokens, {}", config.vocab, tokenizer(model)));
    line("prompts", prompts(model));
    line("context", format!("up to {} tokens", config.context_length));
    line(
        "per token",
        format!("reads {} of weights", bytes(memory::weight_bytes_per_step(model, 1))),
    );
    text
}

fn name(model: &Model) -> &str {
    model.metadata().str("general.name").unwrap_or("(unnamed)")
}

/// Kind of tokenizer and of its splitting, such as `gpt2 (joyai-llm)`.
fn tokenizer(model: &Model) -> String {
    let get = |key| model.metadata().str(key);
    match (get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")) {
        (Ok(kind), Ok(split)) => format!("tokenizer {kind} ({split})"),
        _ => "no tokenizer".to_owned(),
    }
}

/// The profile, or why there is none.
fn prompts(model: &Model) -> String {
    match Profile::of(&model.files()[0]) {
        Ok(profile) => format!("{profile} profile"),
        Err(error) => error.to_string(),
    }
}

/// Such as `4: 1 SWA, 2 CSA, 1 HCA; 1 routed by token id`.
fn layers(config: &Config) -> String {
    let count = |kind| config.layers.iter().filter(|layer| layer.kind == kind).count();
    let hashed = config.layers.iter().filter(|layer| layer.hash_routed).count();
    format!(
        "{}: {} SWA (window only), {} CSA (ratio 4), {} HCA (ratio 128); {hashed} routed by token id",
        config.layers.len(),
        count(LayerKind::Swa),
        count(LayerKind::Csa),
        count(LayerKind::Hca),
    )
}

/// Compress ratio of every layer.
fn schedule(config: &Config) -> String {
    let ratios = config.layers.iter().map(|layer| layer.kind.ratio().to_string());
    ratios.collect::<Vec<_>>().join(" ")
}

fn groups_table(groups: &[Group]) -> String {
    let mut text = format!("\n{:<28}{:<9}{:>8}{:>12}\n", "weights", "type", "tensors", "size");
    for group in groups {
        let size = bytes(group.bytes);
        text += &format!("{:<28}{:<9}{:>8}{size:>12}\n", group.role, group.ty, group.tensors);
    }
    text
}

fn memory_table(memory: &Memory) -> String {
    let needed = memory.kv_state + memory.activations;
    format!(
        "\nmemory at a context of {} tokens\n\
         weights, mapped from the file {:>12}\n\
         KV state                      {:>12}\n\
         intermediate results, about   {:>12}\n\
         needed besides the file       {:>12}\n",
        memory.context,
        bytes(memory.weights),
        bytes(memory.kv_state),
        bytes(memory.activations),
        bytes(needed),
    )
}

fn metadata_table(model: &Model) -> String {
    let mut text = format!("\n{:<50}{:<18}value\n", "metadata", "type");
    for (key, value) in model.metadata().iter() {
        text += &format!("{key:<50}{:<18}{value}\n", value.type_name());
    }
    text
}

fn tensor_table(model: &Model) -> String {
    let mut text = format!("\n{:<40}{:<9}{:<24}{:>12}\n", "tensor", "type", "shape", "size");
    for tensor in model_tensors(model) {
        let (ty, size) = (tensor.ty.name(), bytes(tensor.range.len() as u64));
        let shape = format!("{:?}", tensor.dims);
        text += &format!("{:<40}{ty:<9}{shape:<24}{size:>12}\n", tensor.name);
    }
    text
}

fn tensor_json(tensor: &TensorInfo) -> Value {
    json!({
        "name": tensor.name,
        "type": tensor.ty.name(),
        "dims": tensor.dims,
        "bytes": tensor.range.len(),
    })
}

fn describe(model: &Model, groups: &[Group], memory: &Memory) -> Value {
    let config = &model.config;
    let file = |file: &Arc<GgufFile>| json!({ "name": file.name(), "bytes": file.file_bytes() });
    let hashed = config.layers.iter().filter(|layer| layer.hash_routed).count();
    json!({
        "name": name(model),
        "files": model.files().iter().map(file).collect::<Vec<_>>(),
        "architecture": "deepseek4",
        "layers": config.layers.len(),
        "compress_ratios": config.layers.iter().map(|l| l.kind.ratio()).collect::<Vec<_>>(),
        "hash_routed_layers": hashed,
        "hidden": config.hidden,
        "heads": config.heads,
        "q_rank": config.q_rank,
        "output_groups": config.output_groups,
        "output_rank": config.output_rank,
        "experts": config.experts,
        "experts_used": config.experts_used,
        "expert_width": config.expert_width,
        "index_heads": config.index_heads,
        "index_top_k": config.index_top_k,
        "vocab": config.vocab,
        "tokenizer": tokenizer(model),
        "prompts": prompts(model),
        "context_length": config.context_length,
        "weights": groups,
        "weight_bytes_per_token": memory::weight_bytes_per_step(model, 1),
        "memory": memory,
        "warnings": model.warnings,
    })
}
