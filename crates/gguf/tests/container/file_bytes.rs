//! Builds GGUF files byte by byte, valid or not.

/// A file under construction. Counts in the header are those of the entries
/// added unless set otherwise.
pub struct FileBytes {
    magic: [u8; 4],
    version: u32,
    n_tensors: Option<u64>,
    n_kv: Option<u64>,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: usize,
}

impl FileBytes {
    /// A valid file without metadata and tensors.
    pub fn new() -> Self {
        FileBytes {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_kv: None,
            keys: Vec::new(),
            tensors: Vec::new(),
            data: 0,
        }
    }

    pub fn magic(mut self, magic: &[u8; 4]) -> Self {
        self.magic = *magic;
        self
    }

    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    pub fn n_tensors(mut self, count: u64) -> Self {
        self.n_tensors = Some(count);
        self
    }

    pub fn n_kv(mut self, count: u64) -> Self {
        self.n_kv = Some(count);
        self
    }

    /// A metadata entry: key, number of the value type, bytes of the value.
    pub fn key(self, key: &str, value_type: u32, value: impl AsRef<[u8]>) -> Self {
        self.raw_key([&string(key), &value_type.to_le_bytes()[..], value.as_ref()].concat())
    }

    /// A metadata entry as it is.
    pub fn raw_key(mut self, bytes: Vec<u8>) -> Self {
        self.keys.push(bytes);
        self
    }

    /// An entry of the tensor table.
    pub fn tensor(self, name: &str, dims: &[u64], type_id: u32, offset: u64) -> Self {
        let dims_bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
        self.raw_tensor(
            [
                &string(name)[..],
                &(dims.len() as u32).to_le_bytes(),
                &dims_bytes,
                &type_id.to_le_bytes(),
                &offset.to_le_bytes(),
            ]
            .concat(),
        )
    }

    /// An entry of the tensor table as it is.
    pub fn raw_tensor(mut self, bytes: Vec<u8>) -> Self {
        self.tensors.push(bytes);
        self
    }

    /// Size of the data section, which starts at a multiple of 32.
    pub fn data(mut self, bytes: usize) -> Self {
        self.data = bytes;
        self
    }

    pub fn build(self) -> Vec<u8> {
        let n_tensors = self.n_tensors.unwrap_or(self.tensors.len() as u64);
        let n_kv = self.n_kv.unwrap_or(self.keys.len() as u64);
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(n_tensors.to_le_bytes());
        bytes.extend(n_kv.to_le_bytes());
        bytes.extend(self.keys.concat());
        bytes.extend(self.tensors.concat());
        if self.data > 0 {
            bytes.resize(bytes.len().next_multiple_of(32) + self.data, 0);
        }
        bytes
    }
}

/// A string as a file holds it.
pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

/// An array as a file holds it, with a count that may be wrong.
pub fn array(element_type: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&element_type.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
}
