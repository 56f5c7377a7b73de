//! Small f32 routines: sums of squares, the exponential, SwiGLU.

use super::vector::Vector;

/// Σx².
///
/// # Safety
/// Needs the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn sum_of_squares<V: Vector>(x: &[f32]) -> f32 {
    // SAFETY: the caller has the instruction set, and chunks hold `LANES`
    // numbers.
    unsafe {
        let mut sum = V::splat(0.0);
        let mut chunks = x.chunks_exact(V::LANES);
        for chunk in &mut chunks {
            let v = V::load(chunk.as_ptr());
            sum = V::fma(v, v, sum);
        }
        V::sum(sum) + chunks.remainder().iter().map(|v| v * v).sum::<f32>()
    }
}

/// e^x to about 2 units in the last place for x in −87..=88; below, it stays at
/// the smallest normal number's magnitude or less, above at e^88.
///
/// # Safety
/// Needs the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn exp<V: Vector>(x: V::Float) -> V::Float {
    // SAFETY: the caller has the instruction set.
    unsafe {
        let x = V::max(V::splat(-87.0), V::min(V::splat(88.0), x));
        // x = n·ln 2 + r, with ln 2 in two parts so that r is exact enough.
        let n = V::round(V::mul(x, V::splat(std::f32::consts::LOG2_E)));
        let whole = V::to_float(n);
        let r = V::fma(whole, V::splat(-0.693_359_4), x);
        let r = V::fma(whole, V::splat(2.121_944_4e-4), r);
        // Taylor's coefficients are as good as any at |r| ≤ 0.347 in degree 7.
        let mut p = V::splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = V::fma(p, r, V::splat(c));
        }
        V::scale_by_power(p, n)
    }
}

/// out = factor · silu(min(gate, limit)) · clamp(up, ±limit), element by element.
///
/// # Safety
/// Needs the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn swiglu<V: Vector>(
    gate: &[f32],
    up: &[f32],
    limit: f32,
    factor: f32,
    out: &mut [f32],
) {
    let n = out.len();
    let (gate, up) = (&gate[..n], &up[..n]);
    let whole = n / V::LANES * V::LANES;
    // SAFETY: the caller has the instruction set; every access is inside the
    // slices or the 16 numbers of the copies (`LANES` is at most 16).
    unsafe {
        for i in (0..whole).step_by(V::LANES) {
            let v = swiglu_register::<V>(gate.as_ptr().add(i), up.as_ptr().add(i), limit, factor);
            V::store(out.as_mut_ptr().add(i), v);
        }
        if whole < n {
            let (mut g, mut u, mut v) = ([0.0; 16], [0.0; 16], [0.0; 16]);
            g[..n - whole].copy_from_slice(&gate[whole..]);
            u[..n - whole].copy_from_slice(&up[whole..]);
            V::store(v.as_mut_ptr(), swiglu_register::<V>(g.as_ptr(), u.as_ptr(), limit, factor));
            out[whole..].copy_from_slice(&v[..n - whole]);
        }
    }
}

#[inline(always)]
unsafe fn swiglu_register<V: Vector>(
    gate: *const f32,
    up: *const f32,
    limit: f32,
    factor: f32,
) -> V::Float {
    // SAFETY: as the caller promises.
    unsafe {
        let gate = V::min(V::splat(limit), V::load(gate));
        let up = V::max(V::splat(-limit), V::min(V::splat(limit), V::load(up)));
        let negative = V::mul(gate, V::splat(-1.0));
        let silu = V::div(gate, V::add(V::splat(1.0), exp::<V>(negative)));
        V::mul(V::mul(silu, up), V::splat(factor))
    }
}
