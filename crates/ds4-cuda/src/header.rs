//! The header `constants.cuh`, which is written when kernels are compiled.

use std::fmt::Write;

use crate::{constants, formats::WeightType, params};

/// The numbers of [`constants`](crate::constants), the types of weights, and the bytes of each
/// kernel's parameters, as C++.
pub(crate) fn text() -> String {
    let mut text = String::from("// Written by src/header.rs.\n#pragma once\n");
    let mut define = |name: &str, value: usize| {
        let ty = if i32::try_from(value).is_ok() { "int" } else { "unsigned" };
        // Writing to a string does not fail.
        let _ = writeln!(text, "constexpr {ty} {name} = {value};");
    };
    for (name, value) in constants::ALL {
        define(name, *value);
    }
    for ty in WeightType::ALL {
        let (name, unit) = (ty.name(), ty.unit());
        define(name, ty as usize);
        define(&format!("{name}_COLUMNS"), unit.columns);
        for (part, bytes) in ["CODE", "SCALE", "MORE_SCALE"].iter().zip(unit.bytes) {
            define(&format!("{name}_{part}_BYTES"), bytes);
        }
    }
    define("WEIGHT_TYPES", WeightType::ALL.len());
    for (name, bytes) in params::sizes() {
        define(&format!("{name}_BYTES"), bytes);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_have_the_numbers_of_their_places() {
        for (i, ty) in WeightType::ALL.iter().enumerate() {
            assert_eq!(*ty as usize, i);
        }
    }

    #[test]
    fn the_header_names_each_number_once() {
        let text = text();
        let names = text.lines().filter_map(|line| line.strip_prefix("constexpr "));
        let mut names: Vec<_> = names.filter_map(|rest| rest.split(' ').nth(1)).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert!(all > constants::ALL.len() && names.len() == all);
    }
}
