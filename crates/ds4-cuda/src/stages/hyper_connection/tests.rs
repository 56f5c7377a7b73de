//! Both ways of reading the streams against plain Rust in f64, at full width.

use ds4_model::synth;
use half::f16;

use super::*;
use crate::{stages::attention_tests::harness::device, weights::MixMatrix};

const HIDDEN: usize = 4096;
const OUTPUTS: usize = 24;
const ROWS: usize = 13;
const ITERATIONS: usize = 20;
const HC_EPSILON: f32 = 1e-6;
const RMS_EPSILON: f32 = 1e-6;

struct Inputs {
    hidden: usize,
    streams: Vec<f32>,
    y: Vec<f32>,
    post: Vec<f32>,
    comb: Vec<f32>,
    weights: Vec<f32>,
    halves: bool,
    base: Vec<f32>,
    scale: Vec<f32>,
    norm: Vec<f32>,
    slots: usize,
}

/// Results of all rows.
struct Outputs {
    streams: Vec<f64>,
    post: Vec<f64>,
    comb: Vec<f64>,
    x: Vec<f64>,
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn reading_streams_equals_plain_rust() {
    let device = device();
    // The last has more columns, and more slots, than threads read at once.
    for (hidden, slots, halves) in
        [(HIDDEN, 7, true), (HIDDEN, 1, false), (HIDDEN, 0, true), (HIDDEN + 64, 10, true)]
    {
        let inputs = Inputs::random(hidden, slots, halves);
        let expected = inputs.expected();
        // Few rows, many, and a step of both.
        for few in [ROWS, 0, 2] {
            let found = inputs.run(&device, few);
            let what = format!("{hidden} columns, {slots} slots, {few} rows by slices");
            check(&format!("{what}: streams"), &found.streams, &expected.streams, 1e-6);
            check(&format!("{what}: post"), &found.post, &expected.post, 2e-6);
            check(&format!("{what}: comb"), &found.comb, &expected.comb, 2e-6);
            check(&format!("{what}: x"), &found.x, &expected.x, 2e-6);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let device = device();
    let inputs = Inputs::random(HIDDEN, 7, true);
    // Every number of rows shares the slices among other numbers of blocks.
    let all = inputs.run(&device, ROWS);
    for few in [1, 5] {
        let some = inputs.run(&device, few);
        assert_eq!(some.x[..few * HIDDEN], all.x[..few * HIDDEN]);
        assert_eq!(some.streams[..few * STREAMS * HIDDEN], all.streams[..few * STREAMS * HIDDEN]);
        assert_eq!(some.comb[..few * STREAMS * STREAMS], all.comb[..few * STREAMS * STREAMS]);
    }
}

/// Differences relative to the largest magnitude.
fn check(what: &str, found: &[f64], expected: &[f64], bound: f64) {
    let largest = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // A NaN is worse than any bound.
    let worst = differences.fold(0.0, |m: f64, d| if d <= m { m } else { d });
    println!("{what}: {:.1e}", worst / largest);
    assert!(worst <= bound * largest, "{what}: off by {worst} of {largest}");
}

impl Inputs {
    fn random(hidden: usize, slots: usize, halves: bool) -> Inputs {
        let width = STREAMS * hidden;
        let mut random = fastrand::Rng::with_seed(slots as u64);
        let mut vector = |len: usize, from: f32, to: f32| -> Vec<f32> {
            (0..len).map(|_| from + (to - from) * random.f32()).collect()
        };
        let mut weights = vector(OUTPUTS * width, -0.02, 0.02);
        if halves {
            weights.iter_mut().for_each(|w| *w = f16::from_f32(*w).to_f32());
        }
        Inputs {
            hidden,
            streams: vector(ROWS * width, -2.0, 2.0),
            y: vector(ROWS * slots * hidden, -1.0, 1.0),
            post: vector(ROWS * STREAMS, 0.0, 2.0),
            comb: vector(ROWS * STREAMS * STREAMS, 0.0, 0.5),
            weights,
            halves,
            base: vector(OUTPUTS, -1.0, 1.0),
            scale: vector(3, 0.5, 1.5),
            norm: vector(hidden, 0.5, 1.5),
            slots,
        }
    }

    /// The first `few` rows by slices, the others by rows.
    fn run(&self, device: &Device, few: usize) -> Outputs {
        let weights = if self.halves {
            let halves: Vec<u16> =
                self.weights.iter().map(|&w| f16::from_f32(w).to_bits()).collect();
            device.buffer(bytemuck::cast_slice::<u16, u8>(&halves)).unwrap()
        } else {
            device.buffer(bytemuck::cast_slice::<f32, u8>(&self.weights)).unwrap()
        };
        let buffer = |from: &[f32]| device.buffer(from).unwrap();
        let (base, scale, norm) = (buffer(&self.base), buffer(&self.scale), buffer(&self.norm));
        let (streams, post, comb) = (buffer(&self.streams), buffer(&self.post), buffer(&self.comb));
        let y = (self.slots > 0).then(|| buffer(&self.y));
        let sums = device.alloc(ROWS * sums_len(self.hidden)).unwrap();
        let arrivals = device.alloc_zeroed(ROWS).unwrap();
        let (x, x_low) =
            (device.alloc(ROWS * self.hidden).unwrap(), device.alloc(ROWS * self.hidden).unwrap());
        let hc = HyperConnection {
            function: MixMatrix { weights, halves: self.halves, outputs: OUTPUTS },
            base,
            scale,
        };
        let both = Streams {
            streams: &streams,
            pending: y.as_ref().map(|y| Pending { y, slots: self.slots }),
            post: &post,
            comb: &comb,
            sums: &sums,
            arrivals: &arrivals,
        };
        let reader = Reader { hc: &hc, norm: &norm, x: &x, x_low: &x_low };
        let config = Config {
            hidden: self.hidden,
            hc_epsilon: HC_EPSILON,
            rms_epsilon: RMS_EPSILON,
            sinkhorn_iterations: ITERATIONS,
            ..synth::tiny()
        };
        read(device, &config, &both, few, ROWS, &reader).unwrap();
        assert!(device.download(&arrivals, 0..ROWS).unwrap().iter().all(|&count| count == 0));
        let floats = |b: &Buffer<f32>| -> Vec<f64> {
            let values = device.download(b, 0..b.len()).unwrap();
            values.into_iter().map(f64::from).collect()
        };
        let halves = |b: &Buffer<u16>| device.download(b, 0..b.len()).unwrap();
        let value = |bits: u16| f16::from_bits(bits).to_f64();
        let sums = halves(&x).into_iter().zip(halves(&x_low)).map(|(a, b)| value(a) + value(b));
        Outputs {
            streams: floats(&streams),
            post: floats(&post),
            comb: floats(&comb),
            x: sums.collect(),
        }
    }

    fn width(&self) -> usize {
        STREAMS * self.hidden
    }

    fn expected(&self) -> Outputs {
        let mut out = Outputs { streams: vec![], post: vec![], comb: vec![], x: vec![] };
        for row in 0..ROWS {
            let streams = self.mixed(row);
            self.read(&streams, &mut out);
            out.streams.extend(streams);
        }
        out
    }

    fn mixed(&self, row: usize) -> Vec<f64> {
        let old = &self.streams[row * self.width()..][..self.width()];
        let mut new: Vec<f64> = old.iter().map(|&v| v.into()).collect();
        if self.slots == 0 {
            return new;
        }
        for c in 0..self.hidden {
            let outputs = (0..self.slots).map(|s| (row * self.slots + s) * self.hidden + c);
            let output: f64 = outputs.map(|at| f64::from(self.y[at])).sum();
            for i in 0..STREAMS {
                let mixed = (0..STREAMS).map(|j| {
                    let weight = self.comb[(row * STREAMS + j) * STREAMS + i];
                    f64::from(weight) * f64::from(old[j * self.hidden + c])
                });
                new[i * self.hidden + c] =
                    f64::from(self.post[row * STREAMS + i]) * output + mixed.sum::<f64>();
            }
        }
        new
    }

    fn read(&self, streams: &[f64], out: &mut Outputs) {
        let norm_of = |v: &[f64]| {
            let mean = v.iter().map(|x| x * x).sum::<f64>() / v.len() as f64;
            1.0 / (mean + f64::from(RMS_EPSILON)).sqrt()
        };
        let scale = norm_of(streams);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let logit = |o: usize| {
            let weights = &self.weights[o * self.width()..][..self.width()];
            let dot: f64 = weights.iter().zip(streams).map(|(&w, x)| f64::from(w) * x).sum();
            let part = (o / STREAMS).min(2);
            dot * scale * f64::from(self.scale[part]) + f64::from(self.base[o])
        };
        let epsilon = f64::from(HC_EPSILON);
        let pre: Vec<f64> = (0..STREAMS).map(|i| sigmoid(logit(i)) + epsilon).collect();
        out.post.extend((0..STREAMS).map(|i| 2.0 * sigmoid(logit(STREAMS + i))));
        let mut comb: Vec<f64> =
            (0..STREAMS * STREAMS).map(|i| logit(2 * STREAMS + i).exp()).collect();
        let normalise = |m: &mut [f64], step: usize, stride: usize, epsilon: f64| {
            for i in 0..STREAMS {
                let at = |j: usize| i * stride + j * step;
                let sum: f64 = (0..STREAMS).map(|j| m[at(j)]).sum();
                (0..STREAMS).for_each(|j| m[at(j)] /= sum + epsilon);
            }
        };
        normalise(&mut comb, 1, STREAMS, 0.0);
        comb.iter_mut().for_each(|x| *x += epsilon);
        normalise(&mut comb, STREAMS, 1, epsilon);
        for _ in 1..ITERATIONS {
            normalise(&mut comb, 1, STREAMS, epsilon);
            normalise(&mut comb, STREAMS, 1, epsilon);
        }
        out.comb.extend(comb);
        let column = |c: usize| (0..STREAMS).map(|j| pre[j] * streams[j * self.hidden + c]).sum();
        let x: Vec<f64> = (0..self.hidden).map(column).collect();
        let scale = norm_of(&x);
        out.x.extend(x.iter().zip(&self.norm).map(|(x, &w)| x * scale * f64::from(w)));
    }
}
