//! Tensors of a file to the fields of [`Weights`], checked on the way.

use std::sync::Arc;

use gguf::{GgufFile, TensorInfo, dequantize_row};

use crate::{
    binding::{Binding, ExpectedTensor, Presence, Slot},
    config::{Config, LayerKind},
    error::{Error, Result},
    split::Parts,
    synth::Generator,
    weights::{
        Attention, Compressor, ExpertStack, Experts, HyperConnection, Indexer, LayerWeights,
        Matrix, Routing, TensorData, Weights,
    },
};

/// Binds and validates every tensor of the model. With a seed the files are headers alone, and
/// the tensors' data are generated.
pub(super) fn weights(parts: &Parts, config: &Config, seed: Option<u64>) -> Result<Weights> {
    let scope = |layer| Scope { parts, config, layer, seed };
    let root = scope(None);
    Ok(Weights {
        token_embedding: root.matrix(Slot::TokenEmbedding)?,
        output_hc: root.hyper_connection([
            Slot::OutputHcFunction,
            Slot::OutputHcBase,
            Slot::OutputHcScale,
        ])?,
        output_norm: root.vector(Slot::OutputNorm)?,
        output: root.matrix(Slot::Output)?,
        layers: (0..config.layers.len())
            .map(|layer| scope(Some(layer)).layer_weights(layer))
            .collect::<Result<_>>()?,
    })
}

/// The model's tensors outside of the layers, or those of one layer.
#[derive(Clone, Copy)]
struct Scope<'a> {
    parts: &'a Parts,
    config: &'a Config,
    layer: Option<usize>,
    seed: Option<u64>,
}

/// A tensor of the right shape and type, and the file that holds it.
struct Found<'a> {
    file: &'a Arc<GgufFile>,
    info: &'a TensorInfo,
    expected: ExpectedTensor,
    data: TensorData,
}

impl<'a> Scope<'a> {
    fn layer_weights(self, layer: usize) -> Result<LayerWeights> {
        let kind = self.config.layers[layer].kind;
        let compressed = kind != LayerKind::Swa;
        let indexed = kind == LayerKind::Csa;
        Ok(LayerWeights {
            attn_hc: self.hyper_connection([
                Slot::AttnHcFunction,
                Slot::AttnHcBase,
                Slot::AttnHcScale,
            ])?,
            attn: self.attention()?,
            compressor: compressed.then(|| self.row_compressor()).transpose()?,
            indexer: indexed.then(|| self.indexer()).transpose()?,
            ffn_hc: self.hyper_connection([
                Slot::FfnHcFunction,
                Slot::FfnHcBase,
                Slot::FfnHcScale,
            ])?,
            ffn: self.experts(layer)?,
        })
    }

    fn hyper_connection(self, [function, base, scale]: [Slot; 3]) -> Result<HyperConnection> {
        Ok(HyperConnection {
            function: self.matrix(function)?,
            base: self.vector(base)?,
            scale: self.vector(scale)?,
        })
    }

    fn attention(self) -> Result<Attention> {
        Ok(Attention {
            norm: self.vector(Slot::AttnNorm)?,
            q_a: self.matrix(Slot::QA)?,
            q_a_norm: self.vector(Slot::QANorm)?,
            q_b: self.matrix(Slot::QB)?,
            kv: self.matrix(Slot::Kv)?,
            kv_norm: self.vector(Slot::KvNorm)?,
            sinks: self.vector(Slot::Sinks)?,
            output_a: self.matrix(Slot::OutputA)?,
            output_b: self.matrix(Slot::OutputB)?,
        })
    }

    fn row_compressor(self) -> Result<Compressor> {
        Ok(Compressor {
            kv: self.matrix(Slot::CompressorKv)?,
            gate: self.matrix(Slot::CompressorGate)?,
            position_bias: self.vector(Slot::CompressorPositionBias)?,
            norm: self.vector(Slot::CompressorNorm)?,
        })
    }

    fn indexer(self) -> Result<Indexer> {
        Ok(Indexer {
            q_b: self.matrix(Slot::IndexerQB)?,
            head_weights: self.matrix(Slot::IndexerHeadWeights)?,
            compressor: Compressor {
                kv: self.matrix(Slot::IndexerKv)?,
                gate: self.matrix(Slot::IndexerGate)?,
                position_bias: self.vector(Slot::IndexerPositionBias)?,
                norm: self.vector(Slot::IndexerNorm)?,
            },
        })
    }

    fn experts(self, layer: usize) -> Result<Experts> {
        let norm = self.vector(Slot::FfnNorm)?;
        let router = self.matrix(Slot::Router)?;
        let routing = match self.config.layers[layer].hash_routed {
            true => Routing::Hash(self.expert_table()?),
            false => Routing::Bias(self.vector(Slot::RouterBias)?),
        };
        let (gate, up) = (self.stack(Slot::ExpertGate)?, self.stack(Slot::ExpertUp)?);
        if gate.ty != up.ty {
            let file = self.parts.first().name().to_owned();
            return Err(Error::MixedExperts { file, layer, gate: gate.ty, up: up.ty });
        }
        Ok(Experts {
            norm,
            router,
            routing,
            gate,
            up,
            down: self.stack(Slot::ExpertDown)?,
            shared_gate: self.matrix(Slot::SharedGate)?,
            shared_up: self.matrix(Slot::SharedUp)?,
            shared_down: self.matrix(Slot::SharedDown)?,
        })
    }

    fn matrix(self, slot: Slot) -> Result<Matrix> {
        let found = self.find(slot)?;
        let [cols, rows] = found.sizes();
        Ok(Matrix { ty: found.info.ty, rows, cols, data: found.data })
    }

    fn stack(self, slot: Slot) -> Result<ExpertStack> {
        let found = self.find(slot)?;
        let [cols, rows, experts] = found.sizes();
        Ok(ExpertStack { ty: found.info.ty, experts, rows, cols, data: found.data })
    }

    /// A small tensor as f32, row after row.
    fn vector(self, slot: Slot) -> Result<Vec<f32>> {
        let found = self.find(slot)?;
        let [elements] = found.sizes();
        let mut values = vec![0.0; elements];
        dequantize_row(found.info.ty, found.data.bytes(), &mut values)?;
        match values.iter().position(|value| !value.is_finite()) {
            Some(index) => {
                let (file, tensor) = (found.file.name().to_owned(), found.expected.name);
                Err(Error::NonFinite { file, tensor, index })
            }
            None => Ok(values),
        }
    }

    fn expert_table(self) -> Result<Vec<u32>> {
        let found = self.find(Slot::RouterTable)?;
        let experts = self.config.experts;
        let (ids, _) = found.data.bytes().as_chunks::<4>();
        let check = |(index, id): (usize, &[u8; 4])| {
            let expert = i32::from_le_bytes(*id);
            let in_range = |id: &u32| (*id as usize) < experts;
            u32::try_from(expert).ok().filter(in_range).ok_or_else(|| Error::ExpertId {
                file: found.file.name().to_owned(),
                tensor: found.expected.name.clone(),
                token: index / self.config.experts_used,
                expert,
                experts,
            })
        };
        ids.iter().enumerate().map(check).collect()
    }

    /// Finds the tensor of `slot` and checks its shape and type.
    fn find(self, slot: Slot) -> Result<Found<'a>> {
        let expected = Binding::of(slot).expected(self.config, self.layer);
        let Some((file, info)) = self.parts.tensor(&expected.name) else {
            return Err(Error::MissingTensor {
                file: self.parts.first().name().to_owned(),
                tensor: expected.name,
                reason: self.reason(expected.binding.presence),
            });
        };
        let (file_name, tensor) = (file.name().to_owned(), expected.name.clone());
        if !expected.accepts_dims(&info.dims, self.config) {
            return Err(Error::TensorShape {
                file: file_name,
                tensor,
                found: info.dims.clone(),
                expected: expected.dims,
            });
        }
        let types = expected.binding.role.types();
        if !types.contains(&info.ty) {
            let found = info.ty;
            return Err(Error::TensorType { file: file_name, tensor, found, expected: types });
        }
        let data = match self.seed {
            Some(seed) => {
                let generator = Generator::new(self.config, &expected, info.ty, seed)?;
                TensorData::generated(generator)
            }
            None => TensorData::in_file(file.clone(), info.range.clone()),
        };
        Ok(Found { file, info, expected, data })
    }

    /// Why this layer has a tensor that not every layer has.
    fn reason(self, presence: Presence) -> String {
        let Some(index) = self.layer else {
            return String::new();
        };
        let layer = &self.config.layers[index];
        match presence {
            Presence::Model | Presence::Layers => String::new(),
            Presence::Compressed | Presence::Csa => {
                format!("layer {index} has ratio {}", layer.kind.ratio())
            }
            Presence::HashRouted => format!("layer {index} chooses experts by token id"),
            Presence::ScoreRouted => format!("layer {index} chooses experts by score"),
        }
    }
}

impl Found<'_> {
    /// The tensor's dimensions, the fastest first; the last takes those that are left over.
    fn sizes<const N: usize>(&self) -> [usize; N] {
        let mut sizes = [1; N];
        for (index, &dim) in self.expected.dims.iter().enumerate() {
            sizes[index.min(N - 1)] *= dim as usize;
        }
        sizes
    }
}
