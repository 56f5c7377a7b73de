//! Permuting pairs against a plain loop over the pairs.

use super::*;
use crate::stages::attention_tests::harness::device;

const USED: usize = 6;

/// What the buffers must hold.
#[derive(Debug, PartialEq)]
struct Expected {
    pairs: Vec<u32>,
    offsets: Vec<u32>,
    active: Vec<u32>,
    tiles: Vec<[u32; 2]>,
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn pairs_are_permuted_by_expert() {
    let device = device();
    let mut random = fastrand::Rng::with_seed(5);
    let shapes: [(usize, usize, usize, bool); 8] = [
        (256, 0, 1, false),
        (256, 0, 9, false),
        (256, 3, 64, false),
        (512, 0, 200, false),
        (17, 5, 300, false),
        (256, 0, 3000, false),
        // All rows choose the same experts.
        (256, 1, 400, true),
        (8, 0, 3000, true),
    ];
    for (experts, first, rows, same) in shapes {
        let choice = |random: &mut fastrand::Rng| {
            let mut all: Vec<u32> = (0..experts as u32).collect();
            random.shuffle(&mut all);
            all.truncate(USED);
            all.sort_unstable();
            all
        };
        let one = choice(&mut random);
        let ids: Vec<u32> =
            (0..rows).flat_map(|_| if same { one.clone() } else { choice(&mut random) }).collect();
        let found = permute_on(&device, &ids, experts, first);
        assert_eq!(
            found,
            expected(&ids, experts, first),
            "{experts} experts, rows {first}..{rows}"
        );
    }
}

fn permute_on(device: &Device, ids: &[u32], experts: usize, first: usize) -> Expected {
    let pairs = ids.len() - first * USED;
    let permutation = PermutationBuffers::new(device, experts, pairs).unwrap();
    let ids_on_device = device.buffer(ids).unwrap();
    permute_pairs(device, &ids_on_device, first * USED..ids.len(), experts, &permutation).unwrap();
    let active = device.download(&permutation.active_count, 0..1).unwrap()[0] as usize;
    let tiles = device.download(&permutation.tile_count, 0..1).unwrap()[0] as usize;
    Expected {
        pairs: device.download(&permutation.pairs, 0..pairs).unwrap(),
        offsets: device.download(&permutation.offsets, 0..experts + 1).unwrap(),
        active: device.download(&permutation.active, 0..active).unwrap(),
        tiles: device.download(&permutation.tiles, 0..tiles).unwrap(),
    }
}

fn expected(ids: &[u32], experts: usize, first: usize) -> Expected {
    let mut e = Expected { pairs: vec![], offsets: vec![0], active: vec![], tiles: vec![] };
    for expert in 0..experts as u32 {
        let start = e.pairs.len();
        e.pairs.extend((first * USED..ids.len()).filter(|&i| ids[i] == expert).map(|i| i as u32));
        let end = e.pairs.len();
        e.offsets.push(end as u32);
        if end > start {
            e.active.push(expert);
        }
        e.tiles.extend((start..end).step_by(TILE_PAIRS).map(|at| [expert, at as u32]));
    }
    e
}
