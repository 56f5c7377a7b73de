//! What becomes of every tensor, decided and checked before anything is written.

use ds4_model::{
    binding::{ExpectedTensor, Role, Slot, expected_tensors},
    config::Config,
    synth::Recipe,
};
use gguf::{FileLayout, TensorSpec, TensorType, Value};

use crate::{
    error::{Error, Result},
    imatrix::ImportanceMatrix,
    metadata::ModelMetadata,
    overrides::{Override, fallback},
    source::{Encoding, Input, Source, matrix_shape},
};

/// How to convert.
pub struct Options {
    /// Types by what tensors are for.
    pub recipe: Recipe,
    /// Exceptions; of several that match a tensor the last counts.
    pub overrides: Vec<Override>,
    /// How much each column matters to the routed experts.
    pub importance: Option<ImportanceMatrix>,
}

/// A conversion, ready to be carried out by [`convert`](crate::convert).
pub struct Plan {
    /// The tensors in the order of the output.
    pub tensors: Vec<PlannedTensor>,
    /// What a user should know, a line each.
    pub remarks: Vec<String>,
    pub(crate) layout: FileLayout,
    pub(crate) importance: Option<ImportanceMatrix>,
    /// Differs if anything does that decides the bytes of the output.
    pub(crate) fingerprint: blake3::Hash,
}

/// A tensor of the output.
pub struct PlannedTensor {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Dimensions, the fastest first.
    pub dims: Vec<u64>,
    /// How the source stores it.
    pub from: &'static str,
    /// Its type in the output.
    pub ty: TensorType,
    /// Its bytes in the output.
    pub bytes: u64,
    pub(crate) input: Input,
    pub(crate) conversion: Conversion,
}

/// How rows are converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Conversion {
    /// Bytes stay as they are.
    Copy,
    /// Official FP4 to MXFP4.
    Repack,
    /// Ids of experts, below this number.
    Table(usize),
    /// To f32 and from there to the type of the output.
    Quantize,
}

impl Plan {
    /// Plans the conversion of `source` to a file with `metadata`; `file` is the output's name in
    /// messages.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen, or an override or the importance matrix doesn't fit.
    pub fn new(
        file: &str,
        source: &Source,
        metadata: &ModelMetadata,
        options: Options,
    ) -> Result<Plan> {
        let config = &metadata.config;
        let expected: Vec<_> = expected_tensors(config).collect();
        let types = types(&expected, &options)?;
        let mut remarks = source.unused(&expected);
        let shortened = expected.iter().zip(&types).filter(|(tensor, ty)| ty.shortened(tensor));
        if let Some((tensor, chosen)) = shortened.clone().next() {
            let others = match shortened.count() - 1 {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            remarks.push(format!(
                "{}{others}: {} instead of {}, whose blocks don't fit rows of {}",
                tensor.name, chosen.ty, chosen.recipe, tensor.dims[0]
            ));
        }
        if let Some(importance) = &options.importance {
            importance.check(config)?;
            remarks.extend(importance.remarks(config));
        } else if types.iter().any(|chosen| chosen.ty == TensorType::IQ2_XXS) {
            remarks.push("2-bit types without an importance matrix (--imatrix)".to_owned());
        }
        let tensors: Vec<PlannedTensor> = expected
            .iter()
            .zip(&types)
            .map(|(tensor, chosen)| plan_tensor(source, tensor, chosen.ty, config))
            .collect::<Result<_>>()?;
        let specs: Vec<_> = tensors
            .iter()
            .map(|t| TensorSpec { name: t.name.clone(), dims: t.dims.clone(), ty: t.ty })
            .collect();
        let layout = FileLayout::new(file, &entries(metadata, &options), &specs)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(env!("CARGO_PKG_VERSION").as_bytes());
        hasher.update(layout.header());
        hasher.update(&source.identity());
        if let Some(importance) = &options.importance {
            importance.hash(&mut hasher);
        }
        let fingerprint = hasher.finalize();
        Ok(Plan { tensors, remarks, layout, importance: options.importance, fingerprint })
    }

    /// Size of the output.
    pub fn file_bytes(&self) -> u64 {
        self.layout.file_bytes()
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> u64 {
        self.tensors.iter().map(PlannedTensor::elements).sum()
    }
}

impl PlannedTensor {
    /// Elements of the tensor.
    pub fn elements(&self) -> u64 {
        self.dims.iter().product()
    }
}

/// The type that a recipe gives a tensor, and the one that it gets.
struct ChosenType {
    recipe: TensorType,
    ty: TensorType,
}

impl ChosenType {
    /// Whether it differs only because the recipe's blocks are too long.
    fn shortened(&self, tensor: &ExpectedTensor) -> bool {
        let cols = tensor.dims[0] as usize;
        self.recipe.row_bytes(cols).is_none() && self.ty == fallback(self.recipe, cols)
    }
}

fn types(expected: &[ExpectedTensor], options: &Options) -> Result<Vec<ChosenType>> {
    let overrides = &options.overrides;
    let unused = |o: &&Override| !expected.iter().any(|tensor| o.matches(&tensor.name));
    if let Some(Override { pattern, .. }) = overrides.iter().find(unused) {
        return Err(Error::UnusedOverride { pattern: pattern.clone() });
    }
    let mut types: Vec<ChosenType> = Vec::with_capacity(expected.len());
    for tensor in expected {
        let recipe = options.recipe.type_of(tensor.binding.role);
        let chosen = overrides.iter().rev().find(|o| o.matches(&tensor.name));
        let ty = match chosen {
            Some(chosen) => check_override(tensor, chosen.ty)?,
            None => fallback(recipe, tensor.dims[0] as usize),
        };
        types.push(ChosenType { recipe, ty });
    }
    check_gate_and_up(expected, &types)?;
    Ok(types)
}

fn check_override(tensor: &ExpectedTensor, ty: TensorType) -> Result<TensorType> {
    let allowed = tensor.binding.role.types();
    let refused = |reason| Error::BadOverride { tensor: tensor.name.clone(), ty, reason };
    if !allowed.contains(&ty) {
        let names: Vec<_> = allowed.iter().map(|ty| ty.name()).collect();
        return Err(refused(format!("expected {}", names.join(", "))));
    }
    let cols = tensor.dims[0] as usize;
    if ty.row_bytes(cols).is_none() {
        let block = ty.block_len();
        return Err(refused(format!("rows of {cols} are no whole number of blocks of {block}")));
    }
    Ok(ty)
}

/// Gate and up experts of a layer are multiplied together and so have one type.
fn check_gate_and_up(expected: &[ExpectedTensor], types: &[ChosenType]) -> Result<()> {
    let mut gate: Option<(&ExpectedTensor, TensorType)> = None;
    for (tensor, chosen) in expected.iter().zip(types) {
        match (tensor.binding.slot, gate) {
            (Slot::ExpertGate, _) => gate = Some((tensor, chosen.ty)),
            (Slot::ExpertUp, Some((other, ty)))
                if other.layer == tensor.layer && ty != chosen.ty =>
            {
                return Err(Error::BadOverride {
                    tensor: tensor.name.clone(),
                    ty: chosen.ty,
                    reason: format!("{} is {ty}, and both must be the same", other.name),
                });
            }
            _ => {}
        }
    }
    Ok(())
}

fn plan_tensor(
    source: &Source,
    tensor: &ExpectedTensor,
    ty: TensorType,
    config: &Config,
) -> Result<PlannedTensor> {
    let input = source.find(tensor, config)?;
    let all = |test: fn(&Encoding, TensorType) -> bool| {
        input.parts.iter().all(|part| test(&part.encoding, ty))
    };
    let conversion = if tensor.binding.role == Role::Table {
        Conversion::Table(config.experts)
    } else if all(|from, to| matches!(from, Encoding::Gguf(ty) if *ty == to)) {
        Conversion::Copy
    } else if all(|from, to| matches!(from, Encoding::Fp4 { .. }) && to == TensorType::MXFP4) {
        Conversion::Repack
    } else {
        Conversion::Quantize
    };
    let (rows, cols) = matrix_shape(tensor);
    let row_bytes = ty.row_bytes(cols).unwrap_or(0) as u64;
    Ok(PlannedTensor {
        name: tensor.name.clone(),
        role: tensor.binding.role,
        dims: tensor.dims.clone(),
        from: input.type_name(),
        ty,
        bytes: rows as u64 * row_bytes,
        input,
        conversion,
    })
}

/// The metadata of the output.
fn entries(metadata: &ModelMetadata, options: &Options) -> Vec<(String, Value)> {
    let mut entries = metadata.entries.clone();
    let mut put = |key: &str, value: Value| entries.push((key.to_owned(), value));
    put("general.file_type", options.recipe.file_type().into());
    put("general.quantization_version", 2u32.into());
    if let Some(importance) = &options.importance {
        put("quantize.imatrix.file", importance.file_name().into());
        put("quantize.imatrix.dataset", importance.dataset().into());
        put("quantize.imatrix.entries_count", (importance.len() as u64).into());
        put("quantize.imatrix.chunks_count", importance.chunks().into());
    }
    entries
}
