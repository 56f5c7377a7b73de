//! The stages of the model on the CPU: this file wires them to the model's weights.

use ds4_engine::{
    backend::{Batch, HeadOutput, StageResult, Step, Sublayer},
    experts::RoutedRows,
    rope::{Rotation, rotation},
};
use ds4_model::{
    config::{Config, HEAD_DIM, LayerKind, STREAMS},
    weights::{Compressor, HyperConnection, LayerWeights},
};
use rayon::prelude::*;

use crate::{
    Activations, Cache, CpuBackend,
    attention::AttendStage,
    compressor::CompressStage,
    hyper_connection,
    indexer::SelectStage,
    kernels::Input,
    reference::{products::dequantize, rms_norm},
    router,
    simd::Experts,
};

/// A step under way.
///
/// Activations and caches are open, so that stages of other backends can be compared with these.
pub struct CpuStep<'a> {
    backend: &'a CpuBackend,
    batch: &'a Batch,
    /// Caches of the batch's sessions.
    pub caches: Vec<&'a mut Cache>,
    /// Activations of the batch's rows.
    pub x: Activations,
    /// Logits of the batch's `logit_rows`, after the head.
    logits: Vec<f32>,
}

impl<'a> CpuStep<'a> {
    /// A step of `batch`; `caches[i]` belongs to session `i`.
    pub fn new(backend: &'a CpuBackend, batch: &'a Batch, caches: Vec<&'a mut Cache>) -> Self {
        let x = Activations::new(&backend.model.config, batch.tokens.len());
        CpuStep { backend, batch, caches, x, logits: Vec::new() }
    }

    /// The results, after the head.
    pub fn into_output(self) -> HeadOutput {
        HeadOutput::from_logits(self.batch, self.config().vocab, self.logits)
    }

    fn config(&self) -> &'a Config {
        &self.backend.model.config
    }

    fn layer(&self, layer: usize) -> (&'a LayerWeights, LayerKind) {
        (&self.backend.model.weights.layers[layer], self.config().layers[layer].kind)
    }

    fn hyper_connection(
        &self,
        layer: usize,
        sublayer: Sublayer,
    ) -> (&'a HyperConnection, &'a [f32]) {
        let w = self.layer(layer).0;
        match sublayer {
            Sublayer::Attention => (&w.attn_hc, &w.attn.norm),
            Sublayer::Experts => (&w.ffn_hc, &w.ffn.norm),
        }
    }

    fn project_qkv(&mut self, layer: usize) {
        let (b, (LayerWeights { attn, .. }, kind)) = (self.backend, self.layer(layer));
        let (config, rows, x) = (self.config(), self.batch.decode_rows, &mut self.x);
        let input = b.input(&x.x, config.hidden, rows);
        input.matmul(attn.q_a.view(), &mut x.q_latent);
        input.matmul(attn.kv.view(), &mut x.kv);
        b.norm_rows(&mut x.q_latent, &attn.q_a_norm);
        let latent = b.input(&x.q_latent, config.q_rank, rows);
        latent.matmul(attn.q_b.view(), &mut x.heads);

        let rotations = rotations(&x.plain_rotations, &x.yarn_rotations, kind);
        let heads = x.heads.par_chunks_exact_mut(config.heads * HEAD_DIM).zip(rotations);
        heads.for_each(|(heads, rotation)| {
            for q in heads.chunks_exact_mut(HEAD_DIM) {
                rms_norm(q, None, config.rms_epsilon);
                rotation.apply(q);
            }
        });
        let codec = b.rounding().kv_codec();
        x.kv.par_chunks_exact_mut(HEAD_DIM).zip(rotations).for_each(|(kv, rotation)| {
            rms_norm(kv, Some(&attn.kv_norm), config.rms_epsilon);
            rotation.apply(kv);
            codec.round_trip(kv);
        });
    }

    fn compress(&mut self, layer: usize) {
        let (b, (weights, _), batch) = (self.backend, self.layer(layer), self.batch);
        let input = b.input(&self.x.x, self.config().hidden, batch.decode_rows);
        if let Some(compressor) = &weights.compressor {
            let stage = b.compress_stage(compressor);
            stage.run(batch, &input, &mut self.caches, |c| c.layers[layer].compressed.as_mut());
        }
        if let Some(indexer) = &weights.indexer {
            let stage = b.compress_stage(&indexer.compressor);
            stage.run(batch, &input, &mut self.caches, |c| c.layers[layer].index.as_mut());
        }
    }
}

impl Step for CpuStep<'_> {
    fn embed(&mut self) -> StageResult {
        let (b, batch, x) = (self.backend, self.batch, &mut self.x);
        let table = b.model.weights.token_embedding.view();
        for (token, streams) in
            batch.tokens.iter().zip(x.streams.chunks_exact_mut(STREAMS * table.cols))
        {
            dequantize(table, *token as usize, &mut streams[..table.cols]);
            for s in 1..STREAMS {
                streams.copy_within(..table.cols, s * table.cols);
            }
        }
        for p in batch.spans.iter().flat_map(|s| s.start..s.start + s.rows.len()) {
            x.plain_rotations.push(rotation(&b.plain, p));
            x.yarn_rotations.push(rotation(&b.yarn, p));
        }
        Ok(())
    }

    fn hc_pre(&mut self, layer: usize, sublayer: Sublayer) -> StageResult {
        let (b, (hc, norm)) = (self.backend, self.hyper_connection(layer, sublayer));
        let (config, x) = (self.config(), &mut self.x);
        hyper_connection::pre(
            b.kernels,
            hc,
            config,
            self.batch.decode_rows,
            &x.streams,
            &mut x.x,
            &mut x.post,
            &mut x.comb,
        );
        b.norm_rows(&mut x.x, norm);
        Ok(())
    }

    fn project_and_compress(&mut self, layer: usize) -> StageResult {
        self.project_qkv(layer);
        self.compress(layer);
        Ok(())
    }

    fn select_rows(&mut self, layer: usize) -> StageResult {
        let (b, batch, config) = (self.backend, self.batch, self.config());
        if let Some(weights) = &self.layer(layer).0.indexer {
            let stage = SelectStage {
                kernels: b.kernels,
                config,
                weights,
                rounding: b.rounding(),
                rotations: &self.x.yarn_rotations,
            };
            let input = b.input(&self.x.x, config.hidden, batch.decode_rows);
            let latent = b.input(&self.x.q_latent, config.q_rank, batch.decode_rows);
            let keys = |session: usize| {
                self.caches[session].layers[layer].index.as_ref().map(|index| &index.rows)
            };
            self.x.selected = stage.run(batch, &input, &latent, keys);
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize) -> StageResult {
        let (b, (weights, kind)) = (self.backend, self.layer(layer));
        let (batch, width) = (self.batch, self.config().heads * HEAD_DIM);
        let x = &mut self.x;
        let all_visible = vec![None; batch.tokens.len()];
        let selected = if kind == LayerKind::Csa { &x.selected } else { &all_visible };
        let rotations = rotations(&x.plain_rotations, &x.yarn_rotations, kind);
        let mut caches: Vec<_> = self.caches.iter_mut().map(Some).collect();
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
                kernels: b.kernels,
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

    fn project_output(&mut self, layer: usize) -> StageResult {
        let (b, (LayerWeights { attn, .. }, _)) = (self.backend, self.layer(layer));
        let (config, rows) = (self.config(), self.batch.decode_rows);
        let groups = config.output_groups;
        let mut reduced = vec![0.0; self.batch.tokens.len() * groups * config.output_rank];
        let group_width = config.heads_per_group() * HEAD_DIM;
        Input::grouped(b.kernels, &self.x.heads, group_width, groups, rows)
            .matmul(attn.output_a.view(), &mut reduced);
        let reduced = b.input(&reduced, groups * config.output_rank, rows);
        reduced.matmul(attn.output_b.view(), &mut self.x.y);
        Ok(())
    }

    fn route(&mut self, layer: usize) -> StageResult {
        let (b, (LayerWeights { ffn, .. }, _)) = (self.backend, self.layer(layer));
        let (config, batch, x) = (self.config(), self.batch, &mut self.x);
        let mut logits = vec![0.0; batch.tokens.len() * config.experts];
        let input = b.input(&x.x, config.hidden, batch.decode_rows);
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

    fn run_experts(&mut self, layer: usize) -> StageResult {
        let (b, (LayerWeights { ffn, .. }, _)) = (self.backend, self.layer(layer));
        let (config, n, x) = (self.config(), self.batch.tokens.len(), &mut self.x);
        x.y.fill(0.0);
        let decode_rows = self.batch.decode_rows;
        let (ids, weights) = (&x.expert_ids, &x.expert_weights);
        b.experts.run(&RoutedRows { layer, decode_rows, x: &x.x, ids, weights }, &mut x.y)?;
        let shared = Experts {
            gate: ffn.shared_gate.view(),
            up: ffn.shared_up.view(),
            down: ffn.shared_down.view(),
            count: 1,
            limit: config.layers[layer].shared_swiglu_limit,
        };
        let input = b.input(&x.x, config.hidden, decode_rows);
        input.experts(&shared, &vec![0; n], &vec![1.0; n], &mut x.y, None);
        Ok(())
    }

    fn hc_post(&mut self, _layer: usize, _sublayer: Sublayer) -> StageResult {
        let (hidden, x) = (self.config().hidden, &mut self.x);
        hyper_connection::post(hidden, &x.post, &x.comb, &x.y, &mut x.streams);
        Ok(())
    }

    fn head(&mut self) -> StageResult {
        let (b, batch, config) = (self.backend, self.batch, self.config());
        let weights = &b.model.weights;
        let width = STREAMS * config.hidden;
        let streams: Vec<f32> = batch
            .logit_rows
            .iter()
            .flat_map(|r| &self.x.streams[r * width..(r + 1) * width])
            .copied()
            .collect();
        let rows = batch.decode_logits;
        let mut h = hyper_connection::head(b.kernels, &weights.output_hc, config, rows, &streams);
        b.norm_rows(&mut h, &weights.output_norm);
        self.logits = vec![0.0; batch.logit_rows.len() * config.vocab];
        let input = b.input(&h, config.hidden, rows);
        input.matmul(weights.output.view(), &mut self.logits);
        Ok(())
    }
}

impl CpuBackend {
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

/// The rotations of a layer of this kind.
fn rotations<'a>(plain: &'a [Rotation], yarn: &'a [Rotation], kind: LayerKind) -> &'a [Rotation] {
    match kind {
        LayerKind::Swa => plain,
        LayerKind::Csa | LayerKind::Hca => yarn,
    }
}
