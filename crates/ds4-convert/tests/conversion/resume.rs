//! A stopped conversion goes on and ends with the same bytes.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use ds4_convert::{Error, ModelMetadata, Options, Outcome, Plan, Recipe, Source, convert};

use super::{generate, options};

struct Conversion {
    directory: tempfile::TempDir,
    metadata: ModelMetadata,
}

impl Conversion {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let metadata = generate::describe(directory.path(), &generate::small_config());
        let tensors = generate::tensors(metadata.config());
        generate::write(&directory.path().join("model.safetensors"), &tensors);
        Conversion { directory, metadata }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn plan(&self, options: Options) -> Plan {
        let source = Source::open(&[self.directory.path().to_owned()]).unwrap();
        Plan::new("out.gguf", &source, &self.metadata, options).unwrap()
    }

    /// Converts and stops at the n-th piece.
    fn run(&self, plan: &Plan, output: &Path, stop_at: usize) -> Result<Outcome, Error> {
        let mut pieces = 0;
        convert(plan, output, |_| {
            pieces += 1;
            if pieces > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    }

    fn uninterrupted(&self, plan: &Plan) -> Vec<u8> {
        let output = self.path("whole.gguf");
        self.run(plan, &output, usize::MAX).unwrap();
        fs::read(output).unwrap()
    }
}

#[test]
fn a_stopped_conversion_goes_on_where_it_was() {
    let conversion = Conversion::new();
    let plan = conversion.plan(options(Recipe::Q2, &[]));
    let whole = conversion.uninterrupted(&plan);
    for stop_at in [0, 1, 7, plan.tensors.len() - 1] {
        let output = conversion.path("out.gguf");
        let error = conversion.run(&plan, &output, stop_at).unwrap_err();
        assert!(matches!(error, Error::Stopped { done, .. } if done == stop_at), "{error}");
        assert!(!output.exists());
        let outcome = conversion.run(&plan, &output, usize::MAX).unwrap();
        assert_eq!(outcome.resumed, stop_at);
        assert!(fs::read(&output).unwrap() == whole, "stopped at {stop_at}");
        let left = [".part", ".part.journal"].map(|end| conversion.path(&format!("out.gguf{end}")));
        assert!(left.iter().all(|path| !path.exists()));
        fs::remove_file(output).unwrap();
    }
}

#[test]
fn what_was_damaged_meanwhile_is_made_again() {
    let conversion = Conversion::new();
    let plan = conversion.plan(options(Recipe::Q2, &[]));
    let whole = conversion.uninterrupted(&plan);
    let (output, part) = (conversion.path("out.gguf"), conversion.path("out.gguf.part"));
    let journal = conversion.path("out.gguf.part.journal");
    let damage: [(&str, &dyn Fn()); 4] = [
        ("bytes of a tensor", &|| {
            let mut bytes = fs::read(&part).unwrap();
            let header = bytes.len() - plan.tensors.iter().map(|t| t.bytes as usize).sum::<usize>();
            bytes[header + 5000] ^= 1;
            fs::write(&part, bytes).unwrap();
        }),
        ("the header", &|| {
            let mut bytes = fs::read(&part).unwrap();
            bytes[0] ^= 1;
            fs::write(&part, bytes).unwrap();
        }),
        ("the end of the file", &|| {
            let bytes = fs::read(&part).unwrap();
            fs::write(&part, &bytes[..bytes.len() - 1]).unwrap();
        }),
        ("the end of the journal", &|| {
            let text = fs::read(&journal).unwrap();
            fs::write(&journal, &text[..text.len() - 9]).unwrap();
        }),
    ];
    for (what, damage) in damage {
        conversion.run(&plan, &output, 9).unwrap_err();
        damage();
        let outcome = conversion.run(&plan, &output, usize::MAX).unwrap();
        assert!(outcome.resumed < 9, "{what}: {} believed", outcome.resumed);
        assert!(fs::read(&output).unwrap() == whole, "{what}");
    }
}

#[test]
fn another_plan_begins_anew() {
    let conversion = Conversion::new();
    let output = conversion.path("out.gguf");
    let first = conversion.plan(options(Recipe::Q2, &[]));
    conversion.run(&first, &output, 9).unwrap_err();
    let other = conversion.plan(options(Recipe::Q4, &[]));
    let whole = conversion.uninterrupted(&other);
    assert_eq!(conversion.run(&other, &output, usize::MAX).unwrap().resumed, 0);
    assert!(fs::read(&output).unwrap() == whole);
}

#[test]
fn two_processes_do_not_write_one_file() {
    let conversion = Conversion::new();
    let plan = conversion.plan(options(Recipe::F16, &[]));
    let output = conversion.path("out.gguf");
    let mut inner = None;
    convert(&plan, &output, |_| {
        inner.get_or_insert_with(|| conversion.run(&plan, &output, usize::MAX));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(matches!(inner, Some(Err(Error::Busy { .. }))));
}

#[test]
fn threads_do_not_change_bytes() {
    let conversion = Conversion::new();
    let plan = conversion.plan(options(Recipe::Q2, &[]));
    let with_threads = |n| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        pool.install(|| conversion.uninterrupted(&plan))
    };
    assert!(with_threads(1) == with_threads(3));
}
