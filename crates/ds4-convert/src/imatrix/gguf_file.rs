//! The GGUF format: for each tensor sums of squares `[cols, experts]` and counts `[1, experts]`.

use std::collections::BTreeMap;

use gguf::{GgufFile, TensorInfo, TensorType, dequantize_row};

use super::{ImportanceMatrix, check_values};
use crate::error::{Error, Result, shown};

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

pub(super) fn read(file: String, bytes: Vec<u8>) -> Result<ImportanceMatrix> {
    let gguf = GgufFile::from_vec(file.clone(), bytes)?;
    let mut entries = BTreeMap::new();
    for sums in gguf.tensors() {
        let Some(name) = sums.name.strip_suffix(SUMS) else {
            continue;
        };
        let counts = gguf.tensor(&format!("{name}{COUNTS}")).ok_or_else(|| {
            Error::MissingTensor { file: file.clone(), tensor: format!("{}{COUNTS}", shown(name)) }
        })?;
        let values = means(&gguf, sums, counts)?;
        check_values(&file, name, &values)?;
        entries.insert(name.to_owned(), values);
    }
    if entries.is_empty() {
        let problem = format!("no importance matrix: found no tensors that end in {SUMS}");
        return Err(Error::Input { file, problem });
    }
    let metadata = gguf.metadata();
    let chunks = metadata.optional::<u64>("imatrix.chunk_count")?.unwrap_or(0);
    let datasets = metadata.optional::<&[String]>("imatrix.datasets")?.unwrap_or(&[]);
    Ok(ImportanceMatrix { file, dataset: datasets.join(", "), chunks, entries })
}

/// Sums over counts; 1 for experts that no token used.
fn means(gguf: &GgufFile, sums: &TensorInfo, counts: &TensorInfo) -> Result<Vec<f32>> {
    let (sum_values, count_values) = (values(gguf, sums)?, values(gguf, counts)?);
    let cols = sums.cols() as usize;
    if count_values.len() * cols != sum_values.len() {
        return Err(Error::Importance {
            file: gguf.name().to_owned(),
            entry: counts.name.clone(),
            found: format!("{} counts", count_values.len()),
            expected: format!("{}, one for each row of {}", sum_values.len() / cols, sums.name),
        });
    }
    let experts = sum_values.chunks_exact(cols).zip(&count_values);
    let mean = |(sums, &count): (&[f32], &f32)| -> Vec<f32> {
        if count == 0.0 { vec![1.0; sums.len()] } else { sums.iter().map(|s| s / count).collect() }
    };
    Ok(experts.flat_map(mean).collect())
}

fn values(gguf: &GgufFile, tensor: &TensorInfo) -> Result<Vec<f32>> {
    let bytes = gguf.tensor_bytes(tensor);
    if tensor.ty != TensorType::F32 {
        return Err(Error::TensorType {
            file: gguf.name().to_owned(),
            tensor: tensor.name.clone(),
            found: tensor.ty.name().to_owned(),
            expected: "F32",
        });
    }
    let mut values = vec![0.0; bytes.len() / 4];
    dequantize_row(tensor.ty, bytes, &mut values)?;
    Ok(values)
}

#[cfg(test)]
mod tests {
    use gguf::{FileLayout, TensorSpec, Value, Writer};

    use super::*;

    fn file(tensors: &[(&str, Vec<u64>, Vec<f32>)]) -> Vec<u8> {
        let spec = |(name, dims, _): &(&str, Vec<u64>, Vec<f32>)| TensorSpec {
            name: (*name).to_owned(),
            dims: dims.clone(),
            ty: TensorType::F32,
        };
        let specs: Vec<_> = tensors.iter().map(spec).collect();
        let metadata = [
            ("imatrix.chunk_count".to_owned(), Value::U32(3)),
            ("imatrix.datasets".to_owned(), vec!["a.txt".to_owned()].into()),
        ];
        let layout = FileLayout::new("m", &metadata, &specs).unwrap();
        let mut writer = Writer::new(Vec::new(), layout).unwrap();
        for (name, _, values) in tensors {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer.write_tensor(name, &bytes).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn sums_become_means_and_unused_experts_ones() {
        let bytes = file(&[
            ("x.in_sum2", vec![2, 3], vec![2.0, 4.0, 0.0, 0.0, 9.0, 3.0]),
            ("x.counts", vec![1, 3], vec![2.0, 0.0, 3.0]),
        ]);
        let matrix = read("m".to_owned(), bytes).unwrap();
        assert_eq!(matrix.entry("x"), Some([1.0, 2.0, 1.0, 1.0, 3.0, 1.0].as_slice()));
        assert_eq!((matrix.chunks(), matrix.dataset()), (3, "a.txt"));
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let message = |tensors: &[(&str, Vec<u64>, Vec<f32>)]| {
            read("m".to_owned(), file(tensors)).unwrap_err().to_string()
        };
        let sums = ("x.in_sum2", vec![2, 2], vec![1.0; 4]);
        assert_eq!(message(std::slice::from_ref(&sums)), "m: missing tensor x.counts");
        let counts = ("x.counts", vec![1, 3], vec![1.0; 3]);
        assert!(message(&[sums.clone(), counts]).contains("found 3 counts, expected 2"));
        let counts = ("x.counts", vec![1, 2], vec![1.0, -1.0]);
        assert!(message(&[sums, counts]).contains("x, value 2: found -1"));
        assert!(message(&[("y", vec![1], vec![1.0])]).contains("no importance matrix"));
    }
}
