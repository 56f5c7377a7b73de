//! Checkpoints, overrides and importance that don't fit give one clear line.

use std::{fs, path::Path};

use ds4_convert::{ImportanceMatrix, ModelMetadata, Options, Plan, Recipe, Source};
use safetensors::Dtype;
use serde_json::json;

use super::{
    TINY,
    generate::{self, Content, Tensor},
    options, run, tiny_metadata, with_importance,
};

struct Checkpoint {
    directory: tempfile::TempDir,
    metadata: ModelMetadata,
    tensors: Vec<Tensor>,
}

impl Checkpoint {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let metadata = generate::describe(directory.path(), &generate::small_config());
        let tensors = generate::tensors(metadata.config());
        Checkpoint { directory, metadata, tensors }
    }

    fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    fn plan(&self, options: Options) -> ds4_convert::Result<Plan> {
        generate::write(&self.directory.path().join("model.safetensors"), &self.tensors);
        let source = Source::open(&[self.directory.path().to_owned()])?;
        Plan::new("out.gguf", &source, &self.metadata, options)
    }

    /// The message without the directory.
    fn message(&self, options: Options) -> String {
        let Err(error) = self.plan(options) else { panic!("was accepted") };
        self.without_directory(&error)
    }

    fn conversion_message(&self, recipe: Recipe) -> String {
        generate::write(&self.directory.path().join("model.safetensors"), &self.tensors);
        let inputs = [self.directory.path().to_owned()];
        let output = self.directory.path().join("out.gguf");
        let error = run(&inputs, &self.metadata, options(recipe, &[]), &output).unwrap_err();
        self.without_directory(&error)
    }

    fn without_directory(&self, error: &ds4_convert::Error) -> String {
        let directory = self.directory.path().display().to_string();
        error.to_string().replace(&format!("{directory}/"), "").replace(&directory, "DIR")
    }
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let q2 = || options(Recipe::Q2, &[]);
    let mut missing = Checkpoint::new();
    missing.tensors.retain(|tensor| tensor.name != "layers.1.ffn.experts.3.w2.scale");
    let expected = "DIR: missing tensor layers.1.ffn.experts.3.w2.scale";
    assert_eq!(missing.message(q2()), expected);

    let mut misshapen = Checkpoint::new();
    misshapen.tensor("layers.2.attn.wkv.weight").shape = vec![511, 256];
    let expected = "model.safetensors: tensor layers.2.attn.wkv.weight: shape [511, 256], \
                    expected [512, 256]";
    assert_eq!(misshapen.message(q2()), expected);

    let mut scales = Checkpoint::new();
    scales.tensor("layers.2.attn.wkv.scale").shape = vec![4, 1];
    let expected = "model.safetensors: tensor layers.2.attn.wkv.scale: shape [4, 1], \
                    expected [4, 2]";
    assert_eq!(scales.message(q2()), expected);

    let mut mistyped = Checkpoint::new();
    mistyped.tensor("norm.weight").dtype = Dtype::F64;
    mistyped.tensor("norm.weight").content = Content::Bytes(vec![0; 256 * 8]);
    let expected = "model.safetensors: tensor norm.weight: type F64, expected F32, F16 or BF16";
    assert_eq!(mistyped.message(q2()), expected);
}

#[test]
fn values_that_cannot_be_are_named() {
    let mut not_a_number = Checkpoint::new();
    let mut bytes = not_a_number.tensor("layers.1.ffn.experts.2.w1.scale").bytes();
    bytes[8] = 255;
    not_a_number.tensor("layers.1.ffn.experts.2.w1.scale").content = Content::Bytes(bytes);
    for recipe in [Recipe::Mxfp4, Recipe::Q2] {
        let message = not_a_number.conversion_message(recipe);
        let start = "tensor blk.1.ffn_gate_exps.weight, row 513: ";
        assert!(message.starts_with(start), "{message}");
    }

    let mut wrong_id = Checkpoint::new();
    let mut bytes = wrong_id.tensor("layers.0.ffn.gate.tid2eid").bytes();
    bytes[(17 * 6 + 2) * 8] = 8;
    wrong_id.tensor("layers.0.ffn.gate.tid2eid").content = Content::Bytes(bytes);
    let expected = "tensor blk.0.ffn_gate_tid2eid.weight: token 17 names expert 8, expected 0 to 7";
    assert_eq!(wrong_id.conversion_message(Recipe::Q8), expected);
}

#[test]
fn tensors_of_no_use_are_mentioned() {
    let mut checkpoint = Checkpoint::new();
    for name in ["layers.9.odd.weight", "mtp.0.enorm.weight", "mtp.0.hnorm.weight"] {
        let content = Content::Bytes(vec![0; 4]);
        let (name, dtype, shape) = (name.to_owned(), Dtype::F32, vec![1]);
        checkpoint.tensors.push(Tensor { name, dtype, shape, content });
    }
    let plan = checkpoint.plan(options(Recipe::Q8, &[])).unwrap();
    assert_eq!(
        plan.remarks,
        [
            "2 tensors of draft (MTP) blocks are not converted",
            "unknown tensor layers.9.odd.weight is not converted"
        ]
    );
}

#[test]
fn overrides_are_checked_against_their_tensors() {
    let checkpoint = Checkpoint::new();
    let plan = |overrides: &[&str]| checkpoint.plan(options(Recipe::Q2, overrides)).unwrap();
    let ty = |plan: &Plan, name: &str| {
        plan.tensors.iter().find(|tensor| tensor.name == name).unwrap().ty.name()
    };
    let mixed = plan(&["*_exps.*=q4_k", "blk.2.ffn_down_exps.weight=Q8_0"]);
    assert_eq!(ty(&mixed, "blk.1.ffn_down_exps.weight"), "Q4_K");
    assert_eq!(ty(&mixed, "blk.2.ffn_down_exps.weight"), "Q8_0");
    assert_eq!(ty(&mixed, "blk.2.ffn_gate_exps.weight"), "Q4_K");

    let message = |overrides: &[&str]| checkpoint.message(options(Recipe::Q2, overrides));
    assert_eq!(message(&["blk.9.*=F16"]), "--tensor blk.9.*: matches no tensor of this model");
    assert_eq!(
        message(&["output_norm.weight=Q8_0"]),
        "tensor output_norm.weight: cannot be Q8_0: expected F32, F16, BF16"
    );
    assert_eq!(
        message(&["blk.1.attn_q_b.weight=Q4_K"]),
        "tensor blk.1.attn_q_b.weight: cannot be Q4_K: rows of 128 are no whole number of \
         blocks of 256"
    );
    assert_eq!(
        message(&["blk.1.ffn_up_exps.weight=Q8_0"]),
        "tensor blk.1.ffn_up_exps.weight: cannot be Q8_0: blk.1.ffn_gate_exps.weight is \
         IQ2_XXS, and both must be the same"
    );
}

#[test]
fn rows_too_short_for_a_recipe_get_another_type() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = generate::small_config();
    config["moe_intermediate_size"] = json!(128);
    let metadata = generate::describe(directory.path(), &config);
    let tensors = generate::tensors(metadata.config());
    generate::write(&directory.path().join("model.safetensors"), &tensors);
    let source = Source::open(&[directory.path().to_owned()]).unwrap();
    let plan = Plan::new("out", &source, &metadata, options(Recipe::Q2, &[])).unwrap();
    let expected = "blk.0.ffn_down_exps.weight and 3 more: Q8_0 instead of Q2_K, whose blocks \
                    don't fit rows of 128";
    assert_eq!(plan.remarks[0], expected);
}

#[test]
fn several_files_are_one_checkpoint() {
    let checkpoint = Checkpoint::new();
    let directory = checkpoint.directory.path();
    let half = checkpoint.tensors.len() / 2;
    let files = ["a.safetensors", "b.safetensors"];
    generate::write(&directory.join(files[0]), &checkpoint.tensors[..half]);
    generate::write(&directory.join(files[1]), &checkpoint.tensors[half..]);
    let names = checkpoint.tensors.iter().enumerate();
    let map: serde_json::Map<String, _> =
        names.map(|(i, t)| (t.name.clone(), json!(files[usize::from(i >= half)]))).collect();
    let index = directory.join("model.safetensors.index.json");
    fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();

    let convert = |inputs: &[std::path::PathBuf]| {
        let output = directory.join("out.gguf");
        run(inputs, &checkpoint.metadata, options(Recipe::Q8, &[]), &output).unwrap();
        fs::read(output).unwrap()
    };
    let by_index = convert(&[directory.to_owned()]);
    assert!(convert(std::slice::from_ref(&index)) == by_index);
    assert!(convert(&files.map(|file| directory.join(file))) == by_index);

    let message = |map: serde_json::Value| {
        fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
        let Err(error) = Source::open(std::slice::from_ref(&index)) else { panic!("accepted") };
        checkpoint.without_directory(&error)
    };
    for outside in ["../a.safetensors", "/a.safetensors", "x/a.safetensors", ""] {
        let message = message(json!({ "x": outside }));
        assert!(message.contains("expected a file in the same directory"), "{message}");
    }
    assert_eq!(message(json!({ "x": files[0] })), "a.safetensors: missing tensor x");
    generate::write(&directory.join(files[1]), &checkpoint.tensors);
    let message = message(json!({ "x": files[0], "y": files[1] }));
    assert!(message.contains("found also in"), "{message}");
}

#[test]
fn hostile_headers_are_refused() {
    let checkpoint = Checkpoint::new();
    checkpoint.plan(options(Recipe::Q8, &[])).unwrap();
    let path = checkpoint.directory.path().join("model.safetensors");
    let good = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let with_header = |text: &str| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes.extend([0; 64]);
        bytes
    };
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        with_header(&format!(
            r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#
        ))
    };
    let mut cases = vec![
        tensor("F32", "[16]", "[0,60]"),
        tensor("F32", "[16]", "[0,6400]"),
        tensor("F32", "[16]", "[64,0]"),
        tensor("F32", "[4294967296,4294967296]", "[0,64]"),
        tensor("F33", "[16]", "[0,64]"),
        tensor("F32\u{1b}[2J\u{7f}", "[16]", "[0,64]"),
        tensor("F32\\u001b[2J\\n", "[16]", "[0,64]"),
        tensor(&"F".repeat(10_000), "[16]", "[0,64]"),
        tensor("F32", "[-1]", "[0,64]"),
        with_header("{"),
        with_header("[]"),
        [u64::MAX.to_le_bytes().as_slice(), &good[8..]].concat(),
    ];
    cases.extend([0, 7, 8, 9, header, good.len() - 1].map(|length| good[..length].to_vec()));
    for (number, bytes) in cases.iter().enumerate() {
        fs::write(&path, bytes).unwrap();
        let Err(error) = Source::open(std::slice::from_ref(&path)) else {
            panic!("case {number} was accepted")
        };
        let message = checkpoint.without_directory(&error);
        assert!(message.starts_with("model.safetensors: "), "case {number}: {message}");
        assert!(!message.contains(char::is_control), "case {number}: {message:?}");
        assert!(message.len() < 2000, "case {number}: {message}");
    }
}

#[test]
fn importance_must_fit_the_model() {
    let importance = |name: &str, values: usize| {
        let mut bytes = 1i32.to_le_bytes().to_vec();
        bytes.extend((name.len() as i32).to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes.extend(1i32.to_le_bytes());
        bytes.extend((values as i32).to_le_bytes());
        bytes.extend(vec![1f32; values].iter().flat_map(|v| v.to_le_bytes()));
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        ImportanceMatrix::read(file.path()).unwrap()
    };
    let source = Source::open(&[TINY.into()]).unwrap();
    let metadata = tiny_metadata();
    let plan =
        |importance| Plan::new("out", &source, &metadata, with_importance(Recipe::Q2, importance));
    let name = "blk.1.ffn_gate_exps.weight";
    let Err(error) = plan(importance(name, 256)) else { panic!("was accepted") };
    assert!(error.to_string().ends_with("found 256 values, expected 8 times 256"), "{error}");
    let plan = plan(importance(name, 8 * 256)).unwrap();
    assert!(
        plan.remarks[0].contains(
            "says nothing of 11 of 12 tensors of routed experts, such as blk.0.ffn_gate_exps.weight"
        ),
        "{:?}",
        plan.remarks
    );
}

#[test]
fn inputs_that_are_no_checkpoint_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let message = |paths: &[&Path]| {
        let paths: Vec<_> = paths.iter().map(|path| path.to_path_buf()).collect();
        let Err(error) = Source::open(&paths) else { panic!("was accepted") };
        error.to_string()
    };
    assert!(message(&[]).contains("expected at least one file"));
    assert!(message(&[directory.path()]).contains("found no .safetensors files"));
    assert!(message(&[Path::new(TINY), directory.path()]).contains("must be the only input"));
    assert!(message(&[Path::new("/nowhere.safetensors")]).starts_with("/nowhere.safetensors: "));
    assert!(message(&[Path::new("/dev/null")]).contains("not a regular file"));
}
