//! The stages of the model on the CPU: this file wires them to the model's weights.

use std::sync::Arc;

use ds4_engine::{
    Backend,
    backend::{Batch, Frontier, HeadOutput, LayerRows, StageResult, Sublayer},
    observer::{ExpertObserver, Observation},
    rope::{Frequencies, Rotation, frequencies, rotation},
    rows::CacheRounding,
};
use ds4_model::{
    Model,
    config::{Config, HEAD_DIM, LayerKind, STREAMS},
    weights::{Compressor, HyperConnection, LayerWeights},
};
use rayon::prelude::*;

use crate::{
    Activations, Cache, Kernels,
    attention::AttendStage,
    compressor::CompressStage,
    hyper_connection,
    indexer::SelectStage,
    kernels::Input,
    reference::{products::dequantize, rms_norm},
    router,
    simd::{Experts, Seen},
};

/// Runs a model on the processor, in the current `rayon` thread pool.
pub struct CpuBackend {
    model: Arc<Model>,
    kernels: Kernels,
    rounding: CacheRounding,
    plain: Frequencies,
    yarn: Frequencies,
    observer: Option<Arc<dyn ExpertObserver>>,
}

impl CpuBackend {
    /// A backend for `model`; its weights stay where they are.
    pub fn new(model: Arc<Model>, kernels: Kernels, rounding: CacheRounding) -> Self {
        let plain = frequencies(&model.config, LayerKind::Swa);
        let yarn = frequencies(&model.config, LayerKind::Csa);
        CpuBackend { model, kernels, rounding, plain, yarn, observer: None }
    }

    /// The same, and shows what routed experts are given to `observer`.
    pub fn with_observer(self, observer: Arc<dyn ExpertObserver>) -> Self {
        CpuBackend { observer: Some(observer), ..self }
    }

    /// Which implementation of the hot routines runs.
    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    fn layer(&self, layer: usize) -> (&LayerWeights, LayerKind) {
        (&self.model.weights.layers[layer], self.model.config.layers[layer].kind)
    }

    fn hyper_connection(&self, layer: usize, sublayer: Sublayer) -> (&HyperConnection, &[f32]) {
        let w = &self.model.weights.layers[layer];
        match sublayer {
            Sublayer::Attention => (&w.attn_hc, &w.attn.norm),
            Sublayer::Experts => (&w.ffn_hc, &w.ffn.norm),
        }
    }

    fn input<'a>(&self, x: &'a [f32], cols: usize, decode_rows: usize) -> Input<'a> {
        Input::new(self.kernels, x, cols, decode_rows)
    }

    fn norm_rows(&self, x: &mut [f32], weight: &[f32]) {
        let epsilon = self.model.config.rms_epsilon;
        x.par_chunks_exact_mut(weight.len()).for_each(|x| rms_norm(x, Some(weight), epsilon));
    }

    fn compress_stage<'a>(&'a self, weights: &'a Compressor) -> CompressStage<'a> {
        CompressStage { config: &self.model.config, weights, frequencies: &self.yarn }
    }
}

impl Backend for CpuBackend {
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
        Ok(Cache::new(&self.model.config, self.rounding))
    }

    fn cache_bytes(&self, cache: &Cache) -> usize {
        cache.bytes()
    }

    fn run_step<R: Send>(&self, stages: impl FnOnce() -> R + Send) -> R {
        rayon::scope(|_| stages())
    }

    fn embed(&self, batch: &Batch) -> StageResult<Activations> {
        let mut x = Activations::new(&self.model.config, batch.tokens.len());
        let table = self.model.weights.token_embedding.view();
        for (token, streams) in
            batch.tokens.iter().zip(x.streams.chunks_exact_mut(STREAMS * table.cols))
        {
            dequantize(table, *token as usize, &mut streams[..table.cols]);
            for s in 1..STREAMS {
                streams.copy_within(..table.cols, s * table.cols);
            }
        }
        for p in batch.spans.iter().flat_map(|s| s.start..s.start + s.rows.len()) {
            x.plain_rotations.push(rotation(&self.plain, p));
            x.yarn_rotations.push(rotation(&self.yarn, p));
        }
        Ok(x)
    }

    fn hc_pre(
        &self,
        layer: usize,
        sublayer: Sublayer,
        batch: &Batch,
        x: &mut Activations,
    ) -> StageResult {
        let (hc, norm) = self.hyper_connection(layer, sublayer);
        let (config, rows) = (&self.model.config, batch.decode_rows);
        hyper_connection::pre(
            self.kernels,
            hc,
            config,
            rows,
            &x.streams,
            &mut x.x,
            &mut x.post,
            &mut x.comb,
        );
        self.norm_rows(&mut x.x, norm);
        Ok(())
    }

    fn project_qkv(&self, layer: usize, batch: &Batch, x: &mut Activations) -> StageResult {
        let (LayerWeights { attn, .. }, kind) = self.layer(layer);
        let (config, rows) = (&self.model.config, batch.decode_rows);
        let input = self.input(&x.x, config.hidden, rows);
        input.matmul(attn.q_a.view(), &mut x.q_latent);
        input.matmul(attn.kv.view(), &mut x.kv);
        self.norm_rows(&mut x.q_latent, &attn.q_a_norm);
        let latent = self.input(&x.q_latent, config.q_rank, rows);
        latent.matmul(attn.q_b.view(), &mut x.heads);

        let rotations = rotations(x.plain_rotations.as_slice(), &x.yarn_rotations, kind);
        let heads = x.heads.par_chunks_exact_mut(config.heads * HEAD_DIM).zip(rotations);
        heads.for_each(|(heads, rotation)| {
            for q in heads.chunks_exact_mut(HEAD_DIM) {
                rms_norm(q, None, config.rms_epsilon);
                rotation.apply(q);
            }
        });
        let codec = self.rounding.kv_codec();
        x.kv.par_chunks_exact_mut(HEAD_DIM).zip(rotations).for_each(|(kv, rotation)| {
            rms_norm(kv, Some(&attn.kv_norm), config.rms_epsilon);
            rotation.apply(kv);
            codec.round_trip(kv);
        });
        Ok(())
    }

    fn compress(
        &self,
        layer: usize,
        batch: &Batch,
        x: &mut Activations,
        caches: &mut [&mut Cache],
    ) -> StageResult {
        let (weights, _) = self.layer(layer);
        let input = self.input(&x.x, self.model.config.hidden, batch.decode_rows);
        if let Some(compressor) = &weights.compressor {
            let stage = self.compress_stage(compressor);
            stage.run(batch, &input, caches, |c| c.layers[layer].compressed.as_mut());
        }
        if let Some(indexer) = &weights.indexer {
            let stage = self.compress_stage(&indexer.compressor);
            stage.run(batch, &input, caches, |c| c.layers[layer].index.as_mut());
        }
        Ok(())
    }

    fn select_rows(
        &self,
        layer: usize,
        batch: &Batch,
        x: &mut Activations,
        caches: &mut [&mut Cache],
    ) -> StageResult {
        if let Some(weights) = &self.layer(layer).0.indexer {
            let config = &self.model.config;
            let stage = SelectStage {
                kernels: self.kernels,
                config,
                weights,
                rounding: self.rounding,
                rotations: &x.yarn_rotations,
            };
            let input = self.input(&x.x, config.hidden, batch.decode_rows);
            let latent = self.input(&x.q_latent, config.q_rank, batch.decode_rows);
            let keys = |session: usize| {
                caches[session].layers[layer].index.as_ref().map(|index| &index.rows)
            };
            x.selected = stage.run(batch, &input, &latent, keys);
        }
        Ok(())
    }

    fn attend(
        &self,
        layer: usize,
        batch: &Batch,
        x: &mut Activations,
        caches: &mut [&mut Cache],
    ) -> StageResult {
        let (weights, kind) = self.layer(layer);
        let width = self.model.config.heads * HEAD_DIM;
        let all_visible = vec![None; batch.tokens.len()];
        let selected = if kind == LayerKind::Csa { &x.selected } else { &all_visible };
        let rotations = rotations(&x.plain_rotations, &x.yarn_rotations, kind);
        let mut caches: Vec<_> = caches.iter_mut().map(Some).collect();
        let mut heads = x.heads.as_mut_slice();
        let mut spans = Vec::with_capacity(batch.spans.len());
        for span in &batch.spans {
            let own;
            (own, heads) = heads.split_at_mut(span.rows.len() * width);
            spans.extend(caches[span.session].take().map(|cache| (span, cache, own)));
        }
        // Spans side by side: each begins with decoding its window, which is one thread's work.
        spans.into_par_iter().for_each(|(span, cache, heads)| {
            let rows = span.rows.clone();
            let stage = AttendStage {
                kernels: self.kernels,
                weights: &weights.attn,
                kind,
                span,
                rotations: &rotations[rows.clone()],
                selected: &selected[rows.clone()],
            };
            let kv = &x.kv[rows.start * HEAD_DIM..rows.end * HEAD_DIM];
            stage.run(&mut cache.layers[layer], kv, heads);
        });
        Ok(())
    }

    fn project_output(&self, layer: usize, batch: &Batch, x: &mut Activations) -> StageResult {
        let (LayerWeights { attn, .. }, _) = self.layer(layer);
        let (config, rows) = (&self.model.config, batch.decode_rows);
        let groups = config.output_groups;
        let mut reduced = vec![0.0; batch.tokens.len() * groups * config.output_rank];
        let group_width = config.heads_per_group() * HEAD_DIM;
        Input::grouped(self.kernels, &x.heads, group_width, groups, rows)
            .matmul(attn.output_a.view(), &mut reduced);
        let reduced = self.input(&reduced, groups * config.output_rank, rows);
        reduced.matmul(attn.output_b.view(), &mut x.y);
        Ok(())
    }

    fn route(&self, layer: usize, batch: &Batch, x: &mut Activations) -> StageResult {
        let (LayerWeights { ffn, .. }, _) = self.layer(layer);
        let config = &self.model.config;
        let mut logits = vec![0.0; batch.tokens.len() * config.experts];
        let input = self.input(&x.x, config.hidden, batch.decode_rows);
        input.matmul_exact(ffn.router.view(), &mut logits);
        router::route(
            config,
            &ffn.routing,
            &batch.tokens,
            &mut logits,
            &mut x.expert_ids,
            &mut x.expert_weights,
        );
        Ok(())
    }

    fn run_experts(&self, layer: usize, batch: &Batch, x: &mut Activations) -> StageResult {
        let (LayerWeights { ffn, .. }, _) = self.layer(layer);
        let config = &self.model.config;
        let limits = &config.layers[layer];
        let input = self.input(&x.x, config.hidden, batch.decode_rows);
        let routed = Experts {
            gate: ffn.gate.stacked(),
            up: ffn.up.stacked(),
            down: ffn.down.stacked(),
            count: config.experts,
            limit: limits.swiglu_limit,
        };
        let shared = Experts {
            gate: ffn.shared_gate.view(),
            up: ffn.shared_up.view(),
            down: ffn.shared_down.view(),
            count: 1,
            limit: limits.shared_swiglu_limit,
        };
        let n = batch.tokens.len();
        x.y.fill(0.0);
        let mut show = |expert: usize, rows: &[usize], activations: &[f32]| {
            if let Some(observer) = &self.observer {
                observer.observe(&Observation { layer, expert, rows, input: &x.x, activations });
            }
        };
        let seen: Option<Seen<'_>> = self.observer.is_some().then_some(&mut show);
        input.experts(&routed, &x.expert_ids, &x.expert_weights, &mut x.y, seen);
        input.experts(&shared, &vec![0; n], &vec![1.0; n], &mut x.y, None);
        Ok(())
    }

    fn hc_post(
        &self,
        _layer: usize,
        _sublayer: Sublayer,
        _batch: &Batch,
        x: &mut Activations,
    ) -> StageResult {
        let hidden = self.model.config.hidden;
        hyper_connection::post(hidden, &x.post, &x.comb, &x.y, &mut x.streams);
        Ok(())
    }

    fn head(&self, batch: &Batch, x: Activations) -> StageResult<HeadOutput> {
        let (config, weights) = (&self.model.config, &self.model.weights);
        let width = STREAMS * config.hidden;
        let streams: Vec<f32> = batch
            .logit_rows
            .iter()
            .flat_map(|r| &x.streams[r * width..(r + 1) * width])
            .copied()
            .collect();
        drop(x);
        let rows = batch.decode_logits;
        let mut h =
            hyper_connection::head(self.kernels, &weights.output_hc, config, rows, &streams);
        self.norm_rows(&mut h, &weights.output_norm);
        let mut logits = vec![0.0; batch.logit_rows.len() * config.vocab];
        let input = self.input(&h, config.hidden, rows);
        input.matmul(weights.output.view(), &mut logits);
        Ok(HeadOutput::from_logits(batch, config.vocab, logits))
    }

    fn rewind(&self, cache: &mut Cache, position: usize) {
        cache.rewind(position);
    }

    fn frontier(&self, cache: &Cache, position: usize) -> StageResult<Frontier> {
        Ok(cache.frontier(position))
    }

    fn set_frontier(&self, cache: &mut Cache, frontier: &Frontier) -> StageResult {
        cache.set_frontier(frontier);
        Ok(())
    }

    fn layer_rows(&self, cache: &Cache, layer: usize) -> StageResult<LayerRows> {
        Ok(cache.layers[layer].rows())
    }

    fn set_layer_rows(&self, cache: &mut Cache, layer: usize, rows: &LayerRows) -> StageResult {
        cache.layers[layer].set_rows(rows);
        Ok(())
    }
}

/// The rotations of a layer of this kind.
fn rotations<'a>(plain: &'a [Rotation], yarn: &'a [Rotation], kind: LayerKind) -> &'a [Rotation] {
    match kind {
        LayerKind::Swa => plain,
        LayerKind::Csa | LayerKind::Hca => yarn,
    }
}
