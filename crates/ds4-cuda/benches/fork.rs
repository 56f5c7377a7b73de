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
    let best = |run: &dyn Fn() -> StageResult| {
        let times = (0..REPEATS).map(|_| {
            device.synchronize().expect("the device");
            let start = Instant::now();
            run().and_then(|()| device.synchronize()).expect("a copy");
            start.elapsed().as_secs_f64()
        });
        times.fold(f64::INFINITY, f64::min)
    };
    let copy = |what: &str, time: f64| {
        println!("{what}: {:.2} ms, {:.0} GB/s", time * 1e3, bytes / time / 1e9);
    };
    copy("fork on the device", best(&|| session.fork(tokens).map(drop)));
    let host = best(&|| by_way_of_the_host(&device, &layout, &session, tokens));
    copy("copy by way of the host", host);
    let checkpoint = best(&|| session.save_frontier(tokens).map(drop));
    println!("checkpoint on the device: {:.2} ms", checkpoint * 1e3);
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
