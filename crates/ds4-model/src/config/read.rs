//! Reads a [`Config`] from GGUF metadata and checks every value against what
//! the kernels can run.

use std::{fmt::Display, ops::RangeInclusive};

use gguf::{FromValue, GgufFile, Metadata, TensorInfo, Value};

use super::{Config, HEAD_DIM, INDEX_DIM, LayerConfig, LayerKind, ROPE_DIM, STREAMS, WINDOW, Yarn};
use crate::error::{Error, Result, shown};

/// The only architecture that loads.
pub(crate) const ARCHITECTURE: &str = "deepseek4";

/// Largest width or count that is believed. It is far above every released
/// model, and low enough that no product of two overflows.
const MAX_SIZE: usize = 1 << 24;

/// Most layers that are believed, so that a number in a file cannot ask for
/// much memory. V4 Pro has 61.
const MAX_LAYERS: usize = 1024;

/// Code of the gating function sqrt(softplus(x)).
pub(crate) const GATING_SQRT_SOFTPLUS: usize = 4;

impl Config {
    /// Reads the configuration of a model stored in one file.
    ///
    /// # Errors
    /// If a key is missing, of the wrong type, or has a value that the program cannot run.
    pub fn from_metadata(file: &GgufFile) -> Result<Config> {
        Config::read(file, |name| file.tensor(name))
    }

    /// Reads the configuration from the metadata of `file`. Vocabulary and
    /// draft layers may follow from tensors, which `tensor` finds by name, in
    /// whichever part of a split model they are.
    pub(crate) fn read<'a>(
        file: &GgufFile,
        tensor: impl Fn(&str) -> Option<&'a TensorInfo>,
    ) -> Result<Config> {
        let reader = Reader { file: file.name(), metadata: file.metadata() };
        reader.check_family()?;
        reader.check_kernel_limits()?;

        let blocks = reader.size("block_count", 1..=MAX_LAYERS)?;
        let layers = blocks - trailing_draft_blocks(blocks, &tensor);
        let vocab_rows = tensor("token_embd.weight").and_then(|info| info.dims.get(1)).copied();
        let heads = reader.size("attention.head_count", 1..=MAX_SIZE)?;
        let experts = reader.size("expert_count", 1..=MAX_SIZE)?;
        let config = Config {
            layers: reader.layers(layers)?,
            vocab: reader.vocab(vocab_rows)?,
            context_length: reader.size("context_length", 1..=1 << 31)?,
            hidden: reader.size("embedding_length", 1..=MAX_SIZE)?,
            heads,
            q_rank: reader.size("attention.q_lora_rank", 1..=MAX_SIZE)?,
            output_groups: reader.size("attention.output_group_count", 1..=heads)?,
            output_rank: reader.size("attention.output_lora_rank", 1..=MAX_SIZE)?,
            experts,
            experts_used: reader.size("expert_used_count", 1..=experts)?,
            expert_width: reader.expert_width(layers)?,
            index_heads: reader.index_size("head_count", 1..=MAX_SIZE)?,
            index_top_k: reader.index_size("top_k", 1..=MAX_SIZE)?,
            sinkhorn_iterations: reader.size("hyper_connection.sinkhorn_iterations", 1..=1000)?,
            hc_epsilon: reader.positive("hyper_connection.epsilon")?,
            rms_epsilon: reader.positive("attention.layer_norm_rms_epsilon")?,
            routed_scale: reader.positive("expert_weights_scale")?,
            rope_base: reader.rope_base("rope.freq_base")?,
            compress_rope_base: reader.rope_base("attention.compress_rope_freq_base")?,
            yarn: reader.yarn()?,
        };
        if !heads.is_multiple_of(config.output_groups) {
            let expected = format!("a divisor of {heads} heads");
            let key = key("attention.output_group_count");
            return Err(reader.wrong(key, config.output_groups, expected));
        }
        Ok(config)
    }
}

/// Blocks at the end of the count that hold a draft (MTP) block, not a layer.
/// The tensors decide: files name such blocks in their metadata without having them.
fn trailing_draft_blocks<'a>(
    blocks: usize,
    tensor: &impl Fn(&str) -> Option<&'a TensorInfo>,
) -> usize {
    let is_draft = |block: &usize| tensor(&format!("blk.{block}.nextn.eh_proj.weight")).is_some();
    (1..blocks).rev().take_while(is_draft).count()
}

fn key(name: &str) -> String {
    format!("{ARCHITECTURE}.{name}")
}

struct Reader<'a> {
    file: &'a str,
    metadata: &'a Metadata,
}

impl<'a> Reader<'a> {
    fn check_family(&self) -> Result<()> {
        let architecture = self.metadata.str("general.architecture")?;
        if architecture != ARCHITECTURE {
            let found = shown(architecture);
            return Err(self.wrong("general.architecture", found, ARCHITECTURE));
        }
        let version = self.metadata.optional::<usize>("general.quantization_version")?;
        match version {
            Some(found @ 3..) => {
                Err(self.wrong("general.quantization_version", found, "at most 2"))
            }
            _ => Ok(()),
        }
    }

    /// Checks what the kernels are written for and no [`Config`] can say.
    fn check_kernel_limits(&self) -> Result<()> {
        self.exactly("attention.head_count_kv", 1)?;
        self.exactly("attention.key_length", HEAD_DIM)?;
        self.exactly("attention.value_length", HEAD_DIM)?;
        self.exactly("rope.dimension_count", ROPE_DIM)?;
        self.exactly("attention.sliding_window", WINDOW)?;
        self.index_size("key_length", INDEX_DIM..=INDEX_DIM)?;
        self.exactly("hyper_connection.count", STREAMS)?;
        self.exactly("expert_shared_count", 1)?;
        self.exactly_if_present("expert_gating_func", GATING_SQRT_SOFTPLUS)?;
        self.exactly_if_present("expert_group_count", 0)?;
        self.exactly_if_present("expert_group_used_count", 0)?;

        let normalised = key("expert_weights_norm");
        if !self.metadata.bool(&normalised)? {
            return Err(self.wrong(normalised, false, true));
        }
        let scaling = key("rope.scaling.type");
        match self.metadata.str(&scaling)? {
            "yarn" => Ok(()),
            other => Err(self.wrong(scaling, shown(other), "yarn")),
        }
    }

    fn vocab(&self, embedding_rows: Option<u64>) -> Result<usize> {
        let present = self.metadata.get(&key("vocab_size")).is_some();
        match embedding_rows {
            Some(rows) if !present => {
                let fits = |rows: &usize| (1..=MAX_SIZE).contains(rows);
                let wrong =
                    || self.wrong("rows of token_embd.weight", rows, range_text(1..=MAX_SIZE));
                usize::try_from(rows).ok().filter(fits).ok_or_else(wrong)
            }
            _ => self.size("vocab_size", 1..=MAX_SIZE),
        }
    }

    fn layers(&self, count: usize) -> Result<Vec<LayerConfig>> {
        let ratios: Vec<usize> = self.per_layer("attention.compress_ratios", count)?;
        let hashed = self.size("hash_layer_count", 0..=count)?;
        let limits = self.clamps("swiglu_clamp_exp", count)?;
        let shared_limits = match self.metadata.get(&key("swiglu_clamp_shexp")) {
            Some(_) => self.clamps("swiglu_clamp_shexp", count)?,
            None => limits.clone(),
        };
        let layer = |(index, ratio): (usize, usize)| {
            let wrong = || {
                let key = format!("{}[{index}]", key("attention.compress_ratios"));
                self.wrong(key, ratio, "0, 4 or 128")
            };
            Ok(LayerConfig {
                kind: LayerKind::from_ratio(ratio).ok_or_else(wrong)?,
                hash_routed: index < hashed,
                swiglu_limit: limits[index],
                shared_swiglu_limit: shared_limits[index],
            })
        };
        ratios.into_iter().enumerate().map(layer).collect()
    }

    /// SwiGLU limits, finite and positive.
    fn clamps(&self, name: &str, layers: usize) -> Result<Vec<f32>> {
        let clamps: Vec<f32> = self.per_layer(name, layers)?;
        match clamps.iter().position(|&clamp| !is_positive(clamp)) {
            Some(index) => {
                let key = format!("{}[{index}]", key(name));
                Err(self.wrong(key, clamps[index], "a finite number above 0"))
            }
            None => Ok(clamps),
        }
    }

    fn expert_width(&self, layers: usize) -> Result<usize> {
        let name = "expert_feed_forward_length";
        let widths: Vec<usize> = self.per_layer(name, layers)?;
        let first = widths[0];
        if !(1..=MAX_SIZE).contains(&first) {
            return Err(self.wrong(key(name), first, range_text(1..=MAX_SIZE)));
        }
        match widths.iter().position(|&width| width != first) {
            Some(index) => {
                let key = format!("{}[{index}]", key(name));
                Err(self.wrong(key, widths[index], format!("{first} as in layer 0")))
            }
            None => Ok(first),
        }
    }

    fn yarn(&self) -> Result<Yarn> {
        let beta = |name, default| match self.metadata.get(&key(name)) {
            Some(_) => self.positive(name),
            None => Ok(default),
        };
        Ok(Yarn {
            factor: self.positive("rope.scaling.factor")?,
            original_context: self.size("rope.scaling.original_context_length", 1..=1 << 31)?,
            beta_fast: beta("rope.scaling.yarn_beta_fast", 32.0)?,
            beta_slow: beta("rope.scaling.yarn_beta_slow", 1.0)?,
        })
    }

    /// A value for each of `layers` layers, at least one: an array, whose tail
    /// may describe draft blocks and is dropped, or one number for all.
    fn per_layer<T>(&self, name: &str, layers: usize) -> Result<Vec<T>>
    where
        T: FromValue<'a> + Clone,
        Vec<T>: FromValue<'a>,
    {
        let key = key(name);
        if !matches!(self.metadata.get(&key), Some(Value::Array(_))) {
            return Ok(vec![self.metadata.required(&key)?; layers]);
        }
        let mut values: Vec<T> = self.metadata.required(&key)?;
        if values.len() < layers {
            let found = format!("{} entries", values.len());
            return Err(self.wrong(key, found, format!("at least {layers}")));
        }
        values.truncate(layers);
        Ok(values)
    }

    fn size(&self, name: &str, range: RangeInclusive<usize>) -> Result<usize> {
        self.size_at(key(name), range)
    }

    /// A size of the indexer, whose keys some writers put beside `attention`, not under it.
    fn index_size(&self, name: &str, range: RangeInclusive<usize>) -> Result<usize> {
        let (usual, other) =
            (key(&format!("attention.indexer.{name}")), key(&format!("indexer.{name}")));
        let alias = self.metadata.get(&usual).is_none() && self.metadata.get(&other).is_some();
        self.size_at(if alias { other } else { usual }, range)
    }

    fn size_at(&self, key: String, range: RangeInclusive<usize>) -> Result<usize> {
        let found = self.metadata.usize(&key)?;
        if range.contains(&found) {
            return Ok(found);
        }
        Err(self.wrong(key, found, range_text(range)))
    }

    fn exactly(&self, name: &str, expected: usize) -> Result<()> {
        self.size(name, expected..=expected).map(drop)
    }

    fn exactly_if_present(&self, name: &str, expected: usize) -> Result<()> {
        match self.metadata.get(&key(name)) {
            Some(_) => self.exactly(name, expected),
            None => Ok(()),
        }
    }

    fn positive(&self, name: &str) -> Result<f32> {
        let key = key(name);
        let found = self.metadata.f32(&key)?;
        if is_positive(found) {
            return Ok(found);
        }
        Err(self.wrong(key, found, "a finite number above 0"))
    }

    /// A base of 1 or less would have no slowest frequency.
    fn rope_base(&self, name: &str) -> Result<f32> {
        let key = key(name);
        let found = self.metadata.f32(&key)?;
        if found.is_finite() && found > 1.0 {
            return Ok(found);
        }
        Err(self.wrong(key, found, "a finite number above 1"))
    }

    fn wrong(&self, key: impl Into<String>, found: impl Display, expected: impl Display) -> Error {
        Error::Value {
            file: self.file.to_owned(),
            key: key.into(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}

fn is_positive(value: f32) -> bool {
    value.is_finite() && value > 0.0
}

fn range_text(range: RangeInclusive<usize>) -> String {
    let (low, high) = range.into_inner();
    if low == high { low.to_string() } else { format!("{low} to {high}") }
}
