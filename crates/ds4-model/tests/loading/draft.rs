//! A synthetic model as metadata and tensors that a test can change before it is written.

use std::sync::OnceLock;

use ds4_model::{
    Model,
    config::Config,
    synth::{self, Recipe},
};
use gguf::{FileLayout, GgufFile, TensorSpec, TensorType, Value, Writer};

#[derive(Clone)]
pub struct Draft {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<(TensorSpec, Vec<u8>)>,
}

impl Draft {
    pub fn new(config: &Config, recipe: Recipe) -> Self {
        let bytes = synth::write(config, recipe, 1, Vec::new(), |_| {}).unwrap();
        let file = GgufFile::from_vec("draft", bytes).unwrap();
        let metadata =
            file.metadata().iter().map(|(key, value)| (key.to_owned(), value.clone())).collect();
        let tensors = file.tensors().iter().map(|t| {
            let spec = TensorSpec { name: t.name.clone(), dims: t.dims.clone(), ty: t.ty };
            (spec, file.tensor_bytes(t).to_vec())
        });
        Draft { metadata, tensors: tensors.collect() }
    }

    /// The 2-bit tiny model.
    pub fn tiny() -> Self {
        static TINY: OnceLock<Draft> = OnceLock::new();
        TINY.get_or_init(|| Draft::new(&synth::tiny(), Recipe::Q2)).clone()
    }

    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.remove(key);
        self.metadata.push((key.to_owned(), value.into()));
    }

    pub fn remove(&mut self, key: &str) {
        self.metadata.retain(|(other, _)| other != key);
    }

    pub fn rename(&mut self, key: &str, to: &str) {
        self.metadata.iter_mut().find(|(other, _)| other == key).unwrap().0 = to.to_owned();
    }

    pub fn tensor(&mut self, name: &str) -> &mut (TensorSpec, Vec<u8>) {
        self.tensors.iter_mut().find(|(spec, _)| spec.name == name).unwrap()
    }

    pub fn remove_tensor(&mut self, name: &str) {
        self.tensors.retain(|(spec, _)| spec.name != name);
    }

    pub fn add_tensor(&mut self, name: &str, dims: &[u64], ty: TensorType) {
        let elements = dims.iter().product::<u64>() as usize;
        let bytes = vec![0; elements / ty.block_len() * ty.block_bytes()];
        self.tensors.push((TensorSpec { name: name.into(), dims: dims.into(), ty }, bytes));
    }

    /// Gives a tensor another shape or type; its data become zeros.
    pub fn reshape(&mut self, name: &str, dims: &[u64], ty: TensorType) {
        self.remove_tensor(name);
        self.add_tensor(name, dims, ty);
    }

    pub fn bytes(&self) -> Vec<u8> {
        let specs: Vec<TensorSpec> = self.tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let layout = FileLayout::new("draft", &self.metadata, &specs).unwrap();
        let mut writer = Writer::new(Vec::new(), layout).unwrap();
        for (spec, bytes) in &self.tensors {
            writer.write_tensor(&spec.name, bytes).unwrap();
        }
        writer.finish().unwrap()
    }

    pub fn load(&self) -> Result<Model, String> {
        let file = GgufFile::from_vec("model.gguf", self.bytes()).map_err(|e| e.to_string())?;
        Model::from_gguf(file).map_err(|e| e.to_string())
    }
}
