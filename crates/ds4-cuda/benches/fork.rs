//! The time to fork a session of the full model's shape on the device, beside a copy by way of the
//! host. `cargo bench -p ds4-cuda --bench fork -- TOKENS`; needs a device, no weights.

use std::time::Instant;

use ds4_cuda::{Cache, device::Device};
use ds4_engine::{
    backend::{Cache as _, StageResult},
    layout::StateLayout,
    rows::CacheRounding,
};
use ds4_model::synth;

const REPEATS: usize = 5;

fn main() {
    let tokens = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(100_000);
    let device = Device::open(0).expect("a CUDA device");
    let layout = StateLayout::new(&synth::flash(43), CacheRounding::On);
    let session = Cache::new(&device, &layout, tokens).expect("room for a session");
    let bytes = session.bytes() as f64;
    println!("{tokens} tokens, {:.1} MB of KV state", bytes / 1e6);
    let report = |what: &str, run: &dyn Fn() -> StageResult| {
        let times = (0..REPEATS).map(|_| {
            device.synchronize().expect("the device");
            let start = Instant::now();
            run().and_then(|()| device.synchronize()).expect("a copy");
            start.elapsed().as_secs_f64()
        });
        let best = times.fold(f64::INFINITY, f64::min);
        println!("{what}: {:.2} ms, {:.0} GB/s", best * 1e3, bytes / best / 1e9);
    };
    report("fork on the device", &|| session.fork(tokens).map(drop));
    report("checkpoint on the device", &|| session.save_frontier(tokens).map(drop));
    report("copy by way of the host", &|| by_way_of_the_host(&device, &layout, &session, tokens));
}

fn by_way_of_the_host(
    device: &Device,
    layout: &StateLayout,
    from: &Cache,
    tokens: usize,
) -> StageResult {
    let mut to = Cache::new(device, layout, tokens)?;
    for (l, layer) in layout.layers().iter().enumerate() {
        for (plane, plane_layout) in layer.planes() {
            let rows = from.read_rows(l, plane, 0..plane_layout.rows(tokens))?;
            to.write_rows(l, plane, 0, &rows)?;
        }
    }
    to.write_frontier(&from.read_frontier(tokens)?)
}
