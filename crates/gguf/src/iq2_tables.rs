//! The two tables of IQ2_XXS: 256 groups of eight magnitudes, and the signs of
//! eight elements from a 7-bit code.
//!
//! The grid has no closed formula. Its entries were taken from the `gguf`
//! package of the ggml project (MIT licence), where they are facts of the file
//! format; a test checks them by hash.

/// Magnitudes of groups of eight elements, element 0 in the lowest byte. Each
/// is 8, 25 or 43. Entries ascend as level codes, so index 0 is all 8.
pub static IQ2_XXS_GRID: [u64; 256] = expand_grid();

/// Signs of eight elements by 7-bit code: bit `i` set makes element `i`
/// negative. The eighth bit makes the number of set bits even.
pub static IQ2_SIGNS: [u8; 128] = expand_signs();

const fn expand_grid() -> [u64; 256] {
    const MAGNITUDES: [u64; 3] = [8, 25, 43];
    let mut grid = [0; 256];
    let mut entry = 0;
    while entry < 256 {
        let mut element = 0;
        while element < 8 {
            let level = GRID_LEVELS[entry] >> (2 * element) & 3;
            grid[entry] |= MAGNITUDES[level as usize] << (8 * element);
            element += 1;
        }
        entry += 1;
    }
    grid
}

const fn expand_signs() -> [u8; 128] {
    let mut signs = [0; 128];
    let mut code = 0;
    while code < 128 {
        let parity = (code as u8).count_ones() as u8 & 1;
        signs[code] = code as u8 | parity << 7;
        code += 1;
    }
    signs
}

/// Eight 2-bit levels per entry, element 0 in the lowest bits.
#[rustfmt::skip]
pub(crate) const GRID_LEVELS: [u16; 256] = [
    0, 2, 5, 8, 10, 17, 20, 32, 34, 40, 42, 65,
    68, 80, 88, 97, 100, 128, 130, 138, 162, 257, 260, 272,
    277, 320, 388, 408, 512, 514, 546, 642, 1025, 1028, 1040, 1057,
    1060, 1088, 1090, 1096, 1120, 1153, 1156, 1168, 1188, 1280, 1282, 1288,
    1312, 1350, 1385, 1408, 1425, 1545, 1552, 1600, 1668, 1700, 2048, 2053,
    2056, 2068, 2088, 2113, 2116, 2128, 2130, 2184, 2308, 2368, 2562, 2580,
    4097, 4100, 4112, 4129, 4160, 4192, 4228, 4240, 4245, 4352, 4360, 4384,
    4432, 4442, 4480, 4644, 4677, 5120, 5128, 5152, 5157, 5193, 5248, 5400,
    5474, 5632, 5654, 6145, 6148, 6160, 6208, 6273, 6400, 6405, 6560, 6737,
    8192, 8194, 8202, 8260, 8289, 8320, 8322, 8489, 8520, 8704, 8706, 9217,
    9220, 9232, 9280, 9302, 9472, 9537, 9572, 9872, 10248, 10272, 10388, 10820,
    16385, 16388, 16400, 16408, 16417, 16420, 16448, 16456, 16470, 16480, 16513, 16516,
    16528, 16640, 16672, 16737, 16768, 16773, 16897, 16912, 16968, 16982, 17000, 17408,
    17416, 17440, 17536, 17561, 17682, 17700, 17920, 18433, 18436, 18448, 18496, 18501,
    18688, 18776, 18785, 18818, 19013, 19088, 20480, 20488, 20497, 20505, 20512, 20608,
    20616, 20740, 20802, 20900, 21137, 21648, 21650, 21770, 22017, 22100, 22528, 22545,
    22553, 22628, 22848, 23048, 24580, 24592, 24640, 24680, 24832, 24917, 25112, 25184,
    25600, 25605, 25872, 25874, 25988, 26690, 32768, 32770, 32778, 32833, 32898, 33028,
    33048, 33088, 33297, 33793, 33796, 33808, 33813, 33856, 33888, 34048, 34118, 34196,
    34313, 34368, 34400, 34818, 35076, 35345, 36868, 36880, 36900, 36928, 37025, 37142,
    37248, 37445, 37888, 37922, 37956, 38225, 39041, 39200, 40962, 41040, 41093, 41225,
    41472, 42008, 43088, 43268,
];

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    fn sha256(bytes: impl IntoIterator<Item = u8>) -> String {
        let bytes: Vec<u8> = bytes.into_iter().collect();
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn tables_are_those_of_the_format() {
        assert_eq!(
            sha256(GRID_LEVELS.iter().flat_map(|entry| entry.to_le_bytes())),
            "915952ebc4af8ddba8113583ca1316fc818843f7b825bbf1a25ae1c39bf0e16d"
        );
        assert_eq!(
            sha256(IQ2_XXS_GRID.iter().flat_map(|entry| entry.to_le_bytes())),
            "05826b5d3e472a3a78f196be62ac78acf81df0f909626e12ab9fa2a5d490dd54"
        );
        assert_eq!(
            sha256(IQ2_SIGNS),
            "a76742a603f8beca5212ecce0f1f02f11a4887fd2f7c8b15aca0ea3eb3380c31"
        );
    }
}
