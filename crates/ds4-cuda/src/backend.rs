//! The backend: a model on one device.

use std::{fmt, sync::Arc};

use ds4_engine::{
    Backend,
    backend::{BackendError, Batch, Frontier, HeadOutput, LayerRows, StageResult, Sublayer},
    rope::frequencies,
    rows::CacheRounding,
};
use ds4_model::{
    Model,
    config::{Config, LayerKind},
};

use crate::{
    Activations, Cache, DeviceInfo, Error,
    device::{Buffer, Device},
    driver,
    scratch::{Head, Pool, Scratch},
    stages::layer::{Shape, Stages, visible},
    weights::Weights,
};

/// What to run a model with.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Number of the device; the one with the most free memory if not given.
    pub device: Option<usize>,
    /// Whether cached rows are rounded as in training.
    pub cache_rounding: CacheRounding,
    /// Tokens of context that must fit beside the weights.
    pub context: usize,
}

/// Runs a model on a CUDA device.
pub struct CudaBackend {
    model: Arc<Model>,
    device: Device,
    weights: Weights,
    rounding: CacheRounding,
    frequencies: Buffer<f32>,
    pool: Arc<Pool>,
    report: MemoryReport,
}

/// What fits on a device beside the weights.
#[derive(Debug, Clone)]
pub struct MemoryReport {
    /// The device.
    pub device: DeviceInfo,
    /// Bytes of weights.
    pub weights: u64,
    /// Tokens of context that were asked for, and bytes of their cache.
    pub context: usize,
    /// Bytes of one session's cache at that length.
    pub cache: u64,
    /// Bytes of activations for a chunk of a prompt.
    pub scratch: u64,
}

impl MemoryReport {
    /// Bytes left.
    pub fn left(&self) -> u64 {
        self.device.free_bytes.saturating_sub(self.needed())
    }

    fn needed(&self) -> u64 {
        self.weights + self.cache + self.scratch
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        write!(
            f,
            "{}: {:.1} GiB free; weights {:.1}, a session of {} tokens {:.1}, activations {:.1}, \
             left {:.1} GiB",
            self.device.name,
            gib(self.device.free_bytes),
            gib(self.weights),
            self.context,
            gib(self.cache),
            gib(self.scratch),
            gib(self.left())
        )
    }
}

impl CudaBackend {
    /// Brings `model` to a device; `progress` hears of the bytes done and of all there are.
    ///
    /// # Errors
    /// If there is no driver or device, the model or the context does not fit, or the kernels
    /// don't take it.
    pub fn new(
        model: Arc<Model>,
        options: Options,
        progress: impl FnMut(u64, u64),
    ) -> Result<CudaBackend, Error> {
        let info = choose(options.device)?;
        let config = &model.config;
        let report = MemoryReport {
            weights: Weights::device_bytes(&model)?,
            context: options.context,
            cache: Cache::bytes_at(config, options.cache_rounding, options.context),
            scratch: Scratch::bytes_per_row(config) * PREFILL_CHUNK.min(options.context) as u64,
            device: info,
        };
        if report.needed() > report.device.free_bytes {
            return Err(too_large(&report));
        }
        let device = Device::open(report.device.index)?;
        let weights = Weights::load(&device, &model, progress)?;
        let both = [LayerKind::Swa, LayerKind::Csa].map(|kind| frequencies(config, kind));
        let frequencies = device.buffer(both.as_flattened())?;
        let rounding = options.cache_rounding;
        let scratch = Scratch::new(&device, config, rounding, &weights, 1)?;
        let pool = Pool::new(scratch);
        Ok(CudaBackend { model, device, weights, rounding, frequencies, pool, report })
    }

    /// What fits beside the weights.
    pub fn memory_report(&self) -> &MemoryReport {
        &self.report
    }

    /// The device's name.
    pub fn device_name(&self) -> &str {
        &self.device.info().name
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes per second of a large copy on the device, read and written.
    ///
    /// # Errors
    /// If there is no room for two small parts of a GiB.
    pub fn copy_bandwidth(&self) -> StageResult<f64> {
        const BYTES: usize = 256 << 20;
        const COPIES: usize = 16;
        let from = self.device.alloc_zeroed::<u8>(BYTES)?;
        let mut to = self.device.alloc_zeroed::<u8>(BYTES)?;
        self.device.copy(&from, 0..BYTES, &mut to, 0)?;
        let start = self.device.event()?;
        for _ in 0..COPIES {
            self.device.copy(&from, 0..BYTES, &mut to, 0)?;
        }
        let seconds = start.seconds_until(&self.device.event()?)?;
        Ok((2 * BYTES * COPIES) as f64 / seconds)
    }

    fn stages<'a>(&'a self, scratch: &'a Scratch, shape: Shape) -> Stages<'a> {
        Stages {
            device: &self.device,
            config: &self.model.config,
            weights: &self.weights,
            rounding: self.rounding,
            frequencies: &self.frequencies,
            scratch,
            shape,
        }
    }

    /// Runs a stage, unless the whole step is going to be replayed.
    fn stage(
        &self,
        batch: &Batch,
        x: &mut Activations,
        run: impl FnOnce(Stages<'_>) -> StageResult,
    ) -> StageResult {
        let shape = Shape::of(batch);
        let scratch = x.scratch();
        if is_recorded(scratch, shape) {
            return Ok(());
        }
        run(self.stages(scratch, shape))
    }

    /// Makes room in the caches and tells the device where they are, once a step.
    fn prepare(
        &self,
        batch: &Batch,
        x: &mut Activations,
        caches: &mut [&mut Cache],
    ) -> StageResult {
        if std::mem::replace(&mut x.caches_ready, true) {
            return Ok(());
        }
        for span in &batch.spans {
            caches[span.session].reserve(span.start + span.rows.len())?;
        }
        let pointers = caches.iter().map(|cache| cache.pointers());
        let layers = self.model.config.layers.len();
        x.scratch().caches.upload(&self.device, pointers, layers)
    }

    fn grow(&self, x: &mut Activations, rows: usize, logits: usize) -> StageResult {
        let config = &self.model.config;
        if rows > x.rows() {
            let make =
                |rows| Scratch::new(&self.device, config, self.rounding, &self.weights, rows);
            x.replace_scratch(make, rows)?;
        }
        let scratch = x.scratch();
        if logits > scratch.head.capacity {
            scratch.graphs.clear();
            scratch.head = Head::new(&self.device, config, &self.weights, logits)?;
        }
        Ok(())
    }
}

/// Tokens of a prompt that are best computed together, if nothing else asks for less: matrix units
/// want many tokens to each expert. The memory report reckons with so many.
pub const PREFILL_CHUNK: usize = 4096;

fn is_recorded(scratch: &Scratch, shape: Shape) -> bool {
    shape.rows == shape.decode_rows && scratch.graphs.contains_key(&(shape.rows, shape.logits))
}

fn choose(wanted: Option<usize>) -> Result<DeviceInfo, Error> {
    let devices = driver::devices()?;
    let found = devices.len();
    let chosen = match wanted {
        Some(index) => devices.into_iter().find(|d| d.index == index),
        None => devices.into_iter().max_by_key(|d| d.free_bytes),
    };
    let info = chosen.ok_or(Error::NoDevice { wanted: wanted.unwrap_or(0), found })?;
    let (major, minor) = info.capability;
    if major < 8 {
        return Err(Error::Capability { name: info.name, major, minor });
    }
    Ok(info)
}

fn too_large(report: &MemoryReport) -> Error {
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
    let free = report.device.free_bytes;
    let advice = if report.needed() - report.cache <= free {
        let tokens = (free - (report.needed() - report.cache)) as f64
            / (report.cache as f64 / report.context.max(1) as f64);
        format!("a context of about {} tokens would fit", tokens as u64 / 1024 * 1024)
    } else {
        let (weights, scratch) = (gib(report.weights), gib(report.scratch));
        format!("weights take {weights}, activations {scratch}: use a smaller recipe or the CPU")
    };
    Error::TooLarge {
        name: report.device.name.clone(),
        free: gib(free),
        needed: gib(report.needed()),
        advice,
    }
}

impl Backend for CudaBackend {
    type Activations = Activations;
    type Cache = Cache;

    fn config(&self) -> &Config {
        &self.model.config
    }

    fn cache_rounding(&self) -> CacheRounding {
        self.rounding
    }

    fn model_identity(&self) -> [u8; 32] {
        self.model.identity()
    }

    fn new_cache(&self) -> StageResult<Cache> {
        Cache::new(&self.device, &self.model.config, self.rounding)
    }

    fn cache_bytes(&self, cache: &Cache) -> usize {
        cache.bytes()
    }

    fn reserve(&self, cache: &mut Cache, tokens: usize) -> StageResult {
        cache.make_room(tokens)
    }

    fn embed(&self, batch: &Batch) -> StageResult<Activations> {
        let mut x = self.pool.take();
        self.grow(&mut x, batch.tokens.len(), batch.logit_rows.len())?;
        let top_k = self.model.config.index_top_k;
        let crowded = batch.spans.iter().any(|s| visible(s) > top_k);
        let scratch = x.scratch();
        scratch.step.fill(batch, crowded)?;
        scratch.step.upload(&self.device)?;
        scratch.head.rows.upload(&self.device, &batch.logit_rows)?;
        self.stage(batch, &mut x, |s| s.embed())?;
        Ok(x)
    }

    fn hc_pre(
        &self,
        layer: usize,
        sublayer: Sublayer,
        batch: &Batch,
        x: &mut Activations,
    ) -> StageResult {
        self.stage(batch, x, |s| s.hc_pre(layer, sublayer))
    }

    fn project_qkv(&self, layer: usize, batch: &Batch, x: &mut Activations) -> StageResult {
        self.stage(batch, x, |s| s.project_qkv(layer))
    }

    fn compress(
        &self,
        layer: usize,
        batch: &Batch,
        x: &mut Activations,
        caches: &mut [&mut Cache],
    ) -> StageResult {
        self.prepare(batch, x, caches)?;
        self.stage(batch, x, |s| s.compress(layer))
    }

    fn select_rows(
        &self,
        layer: usize,
        batch: &Batch,
        x: &mut Activations,
        caches: &mut [&mut Cache],
    ) -> StageResult {
        self.prepare(batch, x, caches)?;
        self.stage(batch, x, |s| s.select_rows(layer))
    }

    fn attend(
        &self,
        layer: usize,
        batch: &Batch,
        x: &mut Activations,
        caches: &mut [&mut Cache],
    ) -> StageResult {
        self.prepare(batch, x, caches)?;
        self.stage(batch, x, |s| s.attend(layer))
    }

    fn project_output(&self, layer: usize, batch: &Batch, x: &mut Activations) -> StageResult {
        self.stage(batch, x, |s| s.project_output(layer))
    }

    fn route(&self, layer: usize, batch: &Batch, x: &mut Activations) -> StageResult {
        self.stage(batch, x, |s| s.route(layer))
    }

    fn run_experts(&self, layer: usize, batch: &Batch, x: &mut Activations) -> StageResult {
        self.stage(batch, x, |s| s.run_experts(layer))
    }

    /// The output is spread over the streams when they are read next.
    fn hc_post(
        &self,
        _layer: usize,
        _sublayer: Sublayer,
        _batch: &Batch,
        _x: &mut Activations,
    ) -> StageResult {
        Ok(())
    }

    fn head(&self, batch: &Batch, mut x: Activations) -> StageResult<HeadOutput> {
        let shape = Shape::of(batch);
        let key = (shape.rows, shape.logits);
        let only_decodes = shape.rows == shape.decode_rows;
        let scratch = x.scratch();
        match scratch.graphs.get(&key).filter(|_| only_decodes) {
            // SAFETY: the graph belongs to this scratch, whose buffers it reads and writes, and the
            // table of caches has the addresses of this step's caches.
            #[allow(unsafe_code, reason = "launches kernels")]
            Some(graph) => unsafe { graph.launch() }?,
            None => self.stages(scratch, shape).head()?,
        }
        // Not recorded: how many rows want no more than a token changes from step to step where
        // requests differ, and a launch that waits in the stream costs next to nothing.
        self.stages(scratch, shape).best(batch.best_rows)?;
        let Head { logits, host, best, .. } = &mut scratch.head;
        let best = best.read(&self.device, batch.best_rows)?;
        let [first, end] = [batch.best_rows, shape.logits].map(|n| n * self.model.config.vocab);
        let logits = self.device.download_pinned(logits, first..end, host)?.to_vec();
        if only_decodes && !scratch.graphs.contains_key(&key) {
            match self.device.capture(|| self.stages(scratch, shape).run()) {
                Ok(graph) => drop(scratch.graphs.insert(key, graph)),
                // The output is there; the next step does without a recorded one, too.
                Err(BackendError::OutOfMemory(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(HeadOutput { best, logits })
    }

    fn rewind(&self, cache: &mut Cache, position: usize) {
        cache.rewind(position);
    }

    fn frontier(&self, cache: &Cache, position: usize) -> StageResult<Frontier> {
        cache.frontier(position)
    }

    fn set_frontier(&self, cache: &mut Cache, frontier: &Frontier) -> StageResult {
        cache.set_frontier(frontier)
    }

    fn layer_rows(&self, cache: &Cache, layer: usize) -> StageResult<LayerRows> {
        cache.layer_rows(layer)
    }

    fn set_layer_rows(&self, cache: &mut Cache, layer: usize, rows: &LayerRows) -> StageResult {
        cache.set_layer_rows(layer, rows)
    }
}
