//! The backend: a model on one device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ds4_engine::{
    Backend,
    backend::{self, BackendError, Batch, Forward, HeadOutput, StageResult, own_cache},
    layout::StateLayout,
    rope::frequencies,
    rows::CacheRounding,
};
use ds4_model::{
    Model,
    config::{Config, LayerKind},
};

use crate::{
    Cache, DeviceInfo, Error, cache,
    device::{Buffer, Device, Graph},
    driver,
    scratch::{GRAPH_ROWS, Head, Scratch},
    stages::layer::{CudaStep, Shape, visible},
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
    layout: StateLayout,
    frequencies: Buffer<f32>,
    /// Buffers of the step under way; none if memory ran out when they were made anew.
    scratch: Mutex<Option<Box<Scratch>>>,
    need: Need,
}

/// Bytes for sessions that the driver may need for itself.
const SPARE: u64 = 256 << 20;

/// Bytes of device memory that a model needs.
#[derive(Debug, Clone, Copy)]
struct Need {
    weights: u64,
    /// One session of the context that was asked for.
    session: u64,
    /// Activations for a chunk of a prompt.
    activations: u64,
}

impl Need {
    fn total(&self) -> u64 {
        self.weights + self.session + self.activations
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
        let (config, rounding) = (&model.config, options.cache_rounding);
        let layout = StateLayout::new(config, rounding);
        let rows = PREFILL_CHUNK.min(options.context) as u64;
        let need = Need {
            weights: Weights::device_bytes(&model)?,
            session: cache::bytes_at(&layout, options.context),
            activations: Scratch::bytes_per_row(config) * rows,
        };
        if need.total() > info.free_bytes {
            return Err(too_large(&info, &need, options.context));
        }
        let device = Device::open(info.index)?;
        let weights = Weights::load(&device, &model, progress)?;
        let both = [LayerKind::Swa, LayerKind::Csa].map(|kind| frequencies(config, kind));
        let frequencies = device.buffer(both.as_flattened())?;
        let scratch = Mutex::new(None);
        Ok(CudaBackend { model, device, weights, layout, frequencies, scratch, need })
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

    fn begin_step<'a>(&'a self, scratch: &'a Scratch, shape: Shape) -> CudaStep<'a> {
        CudaStep {
            device: &self.device,
            config: &self.model.config,
            weights: &self.weights,
            rounding: self.layout.rounding(),
            frequencies: &self.frequencies,
            scratch,
            shape,
            pending: None,
        }
    }

    /// Waits for the step before, if there is one.
    fn lock_scratch(&self) -> MutexGuard<'_, Option<Box<Scratch>>> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The buffers, made anew if they are too small for a step.
    fn sized<'a>(
        &self,
        slot: &'a mut Option<Box<Scratch>>,
        rows: usize,
        logits: usize,
    ) -> StageResult<&'a mut Scratch> {
        let had = slot.as_ref().map_or((0, 0), |s| (s.rows, s.head.capacity));
        if slot.is_none() || had.0 < rows || had.1 < logits {
            let config = &self.model.config;
            let make = |sizes| {
                let rounding = self.layout.rounding();
                Scratch::new(&self.device, config, rounding, &self.weights, sizes).map(Box::new)
            };
            // Freed first: two may not fit.
            *slot = None;
            match make((rows.max(had.0), logits.max(had.1))) {
                Ok(scratch) => *slot = Some(scratch),
                Err(error) => {
                    // One as before fits again, or the next step tries once more.
                    *slot = make(had).ok();
                    return Err(error);
                }
            }
        }
        slot.as_deref_mut().ok_or_else(|| BackendError::OutOfMemory("no activations".to_owned()))
    }

    /// Brings a step's tables to the device.
    fn upload(&self, scratch: &mut Scratch, batch: &Batch, caches: &[&mut Cache]) -> StageResult {
        let config = &self.model.config;
        let crowded = batch.spans.iter().any(|s| visible(s) > config.index_top_k);
        scratch.step.fill(batch, crowded)?;
        scratch.step.upload(&self.device)?;
        // A CUDA graph computes logits of as many rows as it has; those behind the wanted ones are
        // of row 0.
        let mut wanted = batch.logit_rows.clone();
        wanted.resize(wanted.len().max(graph_rows(batch).unwrap_or(0)), 0);
        scratch.head.rows.upload(&self.device, &wanted)?;
        let pointers = caches.iter().map(|cache| cache.pointers());
        scratch.caches.upload(&self.device, pointers, config.layers.len())
    }

    /// Captures the launches of a step that decodes `rows` rows, once.
    fn capture(&self, scratch: &mut Scratch, rows: usize, forward: Forward<'_>) -> StageResult {
        if scratch.graphs[rows - 1].is_none() {
            let mut step = self.begin_step(scratch, Shape::decode(rows));
            match self.device.capture(|| forward(&mut step)) {
                Ok(graph) => scratch.graphs[rows - 1] = Some(graph),
                // The step goes on without a graph.
                Err(BackendError::OutOfMemory(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Runs the step: as a CUDA graph if it only decodes, else launch by launch.
    fn run(&self, scratch: &mut Scratch, batch: &Batch, forward: Forward<'_>) -> StageResult {
        let rows = graph_rows(batch);
        if let Some(rows) = rows {
            self.capture(scratch, rows, forward)?;
        }
        let graph: Option<&Graph> = rows.and_then(|rows| scratch.graphs[rows - 1].as_ref());
        match graph {
            // SAFETY: the graph belongs to this scratch, whose buffers it reads and writes, and the
            // table of caches has the addresses of this step's caches.
            #[allow(unsafe_code, reason = "launches kernels")]
            Some(graph) => unsafe { graph.launch() },
            None => {
                let shape = rows.map_or_else(|| Shape::of(batch), Shape::decode);
                forward(&mut self.begin_step(scratch, shape))
            }
        }
    }
}

/// Rows of a step that is run as a CUDA graph: one that decodes and does nothing else.
fn graph_rows(batch: &Batch) -> Option<usize> {
    let rows = batch.tokens.len();
    (batch.decode_rows == rows && (1..=GRAPH_ROWS).contains(&rows)).then_some(rows)
}

/// Tokens of a prompt that are best computed together, if nothing else asks for less: tensor cores
/// want many tokens to each expert. The memory report reckons with so many.
pub const PREFILL_CHUNK: usize = 4096;

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

fn too_large(device: &DeviceInfo, need: &Need, context: usize) -> Error {
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
    let (free, beside) = (device.free_bytes, need.weights + need.activations);
    let advice = if beside <= free {
        let tokens = (free - beside) as f64 / (need.session as f64 / context.max(1) as f64);
        format!("a context of about {} tokens would fit", tokens as u64 / 1024 * 1024)
    } else {
        let (weights, activations) = (gib(need.weights), gib(need.activations));
        format!(
            "weights take {weights}, activations {activations}: use a smaller recipe or the CPU"
        )
    };
    Error::TooLarge {
        name: device.name.clone(),
        free: gib(free),
        needed: gib(need.total()),
        advice,
    }
}

impl Backend for CudaBackend {
    fn config(&self) -> &Config {
        &self.model.config
    }

    fn model_identity(&self) -> [u8; 32] {
        self.model.identity()
    }

    fn layout(&self) -> &StateLayout {
        &self.layout
    }

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn device(&self) -> String {
        self.device.info().name.clone()
    }

    fn prefill_chunk(&self) -> usize {
        PREFILL_CHUNK
    }

    fn memory(&self, context: usize) -> StageResult<backend::MemoryReport> {
        let missing = match &*self.lock_scratch() {
            Some(scratch) if scratch.rows >= PREFILL_CHUNK.min(context) => 0,
            _ => self.need.activations,
        };
        let free = self.device.free_bytes()?;
        Ok(backend::MemoryReport {
            device: Backend::device(self),
            weights: self.need.weights,
            activations: self.need.activations,
            left: Some(free.saturating_sub(missing + SPARE)),
            context,
            session: self.session_bytes(context),
        })
    }

    fn bandwidth(&self) -> StageResult<f64> {
        self.copy_bandwidth()
    }

    fn new_cache(&self) -> StageResult<Box<dyn backend::Cache>> {
        Ok(Box::new(Cache::new(&self.device, &self.layout, 0)?))
    }

    fn session_bytes(&self, tokens: usize) -> u64 {
        cache::bytes_at(&self.layout, tokens)
    }

    /// Makes buffers for a whole chunk of a prompt, and captures the CUDA graph of every number of
    /// sessions that may decode together.
    fn warm_up(&self, sessions: usize, forward: Forward<'_>) -> StageResult {
        let mut slot = self.lock_scratch();
        let rows = PREFILL_CHUNK.min(self.model.config.context_length);
        let scratch = self.sized(&mut slot, rows, sessions)?;
        (1..=sessions.min(GRAPH_ROWS)).try_for_each(|rows| self.capture(scratch, rows, forward))
    }

    fn step(
        &self,
        batch: &Batch,
        caches: &mut [&mut dyn backend::Cache],
        forward: Forward<'_>,
    ) -> StageResult<HeadOutput> {
        let own = caches.iter_mut().map(|cache| own_cache::<Cache>(&mut **cache));
        let caches: Vec<&mut Cache> = own.collect::<StageResult<_>>()?;
        let mut slot = self.lock_scratch();
        let logits = batch.logit_rows.len();
        let scratch = self.sized(&mut slot, batch.tokens.len(), logits)?;
        self.upload(scratch, batch, &caches)?;
        self.run(scratch, batch, forward)?;
        // Not in the graph: the number of rows that want no more than an argmax differs from step
        // to step, and a launch that waits in the stream costs next to nothing.
        self.begin_step(scratch, Shape::of(batch)).argmax(batch.argmax_rows)?;
        let Head { logits: device_logits, host, best, .. } = &mut scratch.head;
        let argmax = best.read(&self.device, batch.argmax_rows)?;
        let [first, end] = [batch.argmax_rows, logits].map(|n| n * self.model.config.vocab);
        let logits = self.device.download_pinned(device_logits, first..end, host)?.to_vec();
        Ok(HeadOutput { argmax, logits })
    }
}
