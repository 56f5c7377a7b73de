//! Compiling the kernels for the device at hand, and keeping the result on disk.
//!
//! Numbers that Rust and kernels share come with them, in a header of its own (`header`).
//!
//! The key of a cached image is a hash of the sources, that header, the options, the compute
//! capability and the compiler's version; the file also holds a hash of its content, so a damaged
//! one is compiled again.

#![allow(unsafe_code, reason = "talks to the driver")]

use std::{
    ffi::{CStr, CString, c_char},
    fs,
    io::Write,
    path::{Path, PathBuf},
    ptr,
};

use cudarc::nvrtc::sys;
use directories::ProjectDirs;
use sha2::{Digest, Sha256};

use crate::{Error, header};

/// A file of kernels.
pub struct Program {
    name: &'static str,
    source: &'static str,
}

macro_rules! programs {
    ($($name:literal),*) => {
        &[$(Program { name: $name, source: include_str!(concat!("../kernels/", $name)) }),*]
    };
}

/// All kernels.
pub const PROGRAMS: &[Program] = programs!(
    "argmax.cu",
    "attention_decode.cu",
    "attention_prefill.cu",
    "compressor.cu",
    "decode_products.cu",
    "embed.cu",
    "experts.cu",
    "experts_q2.cu",
    "generate.cu",
    "hyper_connection.cu",
    "indexer.cu",
    "key_value.cu",
    "prefill_products.cu",
    "repack.cu",
    "router.cu"
);

/// Headers that programs may include, beside `constants.cuh`.
const HEADERS: &[Program] = programs!(
    "ptx.cuh",
    "common.cuh",
    "rows.cuh",
    "attention.cuh",
    "formats.cuh",
    "products.cuh",
    "batch_products.cuh",
    "mixing.cuh",
    "quantised.cuh",
    "expert_tiles.cuh",
    "permutation.cuh",
    "router.cuh"
);

/// Name of the header that is written for the kernels.
const CONSTANTS: &str = "constants.cuh";

const OPTIONS: &[&str] = &["--std=c++17", "-default-device", "-lineinfo"];

impl Program {
    /// Whether its source has a function or macro argument of this name.
    pub fn mentions(&self, kernel: &str) -> bool {
        let names = self.source.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        names.into_iter().any(|name| name == kernel)
    }
}

/// The machine code of `program` for a device of this compute capability.
pub fn image(program: &Program, capability: (u32, u32)) -> Result<Vec<u8>, Error> {
    let target = architecture(capability);
    let path = cache_path(program, &target);
    if let Some(image) = path.as_deref().and_then(read) {
        return Ok(image);
    }
    let image = compile(program, &target)?;
    if let Some(path) = path {
        // A cache that can't be written costs the next start some seconds, nothing more.
        let _ = write(&path, &image);
    }
    Ok(image)
}

/// 9.0 has instructions that later generations lack: `sm_90a` has them.
fn architecture(capability: (u32, u32)) -> String {
    match capability {
        (9, 0) => "--gpu-architecture=sm_90a".to_owned(),
        (major, minor) => format!("--gpu-architecture=sm_{major}{minor}"),
    }
}

fn cache_path(program: &Program, target: &str) -> Option<PathBuf> {
    let mut hash = Sha256::new();
    for part in HEADERS.iter().chain([program]) {
        hash.update(part.source);
        hash.update([0]);
    }
    hash.update(header::text());
    hash.update(OPTIONS.join(" "));
    hash.update(target);
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are valid; a missing library was ruled out by the driver's presence
    // or is reported by `compile`.
    if unsafe { !sys::is_culib_present() || sys::nvrtcVersion(&mut major, &mut minor) != OK } {
        return None;
    }
    hash.update(format!("{major}.{minor}"));
    let stem = program.name.trim_end_matches(".cu");
    let name = format!("{stem}-{:.16}.cubin", hex(&hash.finalize()));
    Some(ProjectDirs::from("", "", "ds4")?.cache_dir().join("kernels").join(name))
}

/// The image in a cache file, if the file is whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut file = fs::read(path).ok()?;
    let hash = file.split_off(file.len().checked_sub(32)?);
    (Sha256::digest(&file)[..] == hash[..]).then_some(file)
}

fn write(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(image)?;
    file.write_all(&Sha256::digest(image))?;
    file.persist(path)?;
    Ok(())
}

const OK: sys::nvrtcResult = sys::nvrtcResult::NVRTC_SUCCESS;

fn compile(program: &Program, target: &str) -> Result<Vec<u8>, Error> {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoCompiler);
    }
    let source = c_string(program.source)?;
    let name = c_string(program.name)?;
    let constants = header::text();
    let headers = HEADERS.iter().map(|h| (h.name, h.source)).chain([(CONSTANTS, &*constants)]);
    let (names, headers): (Vec<_>, Vec<_>) = headers.unzip();
    let c_strings = |all: &[&str]| all.iter().map(|s| c_string(s)).collect::<Result<Vec<_>, _>>();
    let (names, headers) = (c_strings(&names)?, c_strings(&headers)?);
    let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
    let mut handle = ptr::null_mut();
    // SAFETY: all strings live until the program is made.
    let result = unsafe {
        sys::nvrtcCreateProgram(
            &mut handle,
            source.as_ptr(),
            name.as_ptr(),
            headers.len() as i32,
            pointers(&headers).as_ptr(),
            pointers(&names).as_ptr(),
        )
    };
    check(program, result, String::new())?;
    let handle = Handle(handle);
    let options: Vec<CString> =
        OPTIONS.iter().chain([&target]).map(|o| c_string(o)).collect::<Result<_, _>>()?;
    let options = pointers(&options);
    // SAFETY: the program and the options are alive.
    let result =
        unsafe { sys::nvrtcCompileProgram(handle.0, options.len() as i32, options.as_ptr()) };
    check(program, result, handle.log())?;
    let mut size = 0;
    // SAFETY: the program is compiled and the buffer has the size it reports.
    unsafe {
        check(program, sys::nvrtcGetCUBINSize(handle.0, &mut size), String::new())?;
        let mut image = vec![0u8; size];
        check(program, sys::nvrtcGetCUBIN(handle.0, image.as_mut_ptr().cast()), String::new())?;
        Ok(image)
    }
}

struct Handle(sys::nvrtcProgram);

impl Handle {
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the buffer has the size that the program reports.
        unsafe {
            if sys::nvrtcGetProgramLogSize(self.0, &mut size) != OK {
                return String::new();
            }
            let mut log = vec![0u8; size];
            if sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast::<c_char>()) != OK {
                return String::new();
            }
            String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned()
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by nvrtcCreateProgram and not used again.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn check(program: &Program, result: sys::nvrtcResult, log: String) -> Result<(), Error> {
    if result == OK {
        return Ok(());
    }
    // SAFETY: the compiler returns a static string.
    let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) };
    let error = format!("{}\n{log}", text.to_string_lossy());
    Err(Error::Compile { program: program.name, error: error.trim_end().to_owned() })
}

fn c_string(text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::CString(text.to_owned()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
