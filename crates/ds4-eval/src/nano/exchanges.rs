//! Lists, sums, and questions about a short text.

use fastrand::Rng;
use serde_json::{Value, json};

use super::{
    pick, sample, single,
    words::{ANIMALS, CITIES, JOBS, NAMES, NOUNS},
};

/// A list of two to twelve words or numbers.
fn items(rng: &mut Rng) -> (Vec<String>, bool) {
    let (count, are_numbers) = (rng.usize(2..=12), rng.bool());
    let items = match are_numbers {
        true => {
            let numbers: Vec<u32> = (10..100).collect();
            sample(rng, &numbers, count).iter().map(u32::to_string).collect()
        }
        false => sample(rng, NOUNS, count).into_iter().map(str::to_owned).collect(),
    };
    (items, are_numbers)
}

fn list_case(request: &str, items: &[String], answer: &[String]) -> Value {
    let grade = json!({ "type": "exact", "answer": answer.join(", ") });
    single(&format!("{request}: {}", items.join(", ")), false, grade)
}

pub(super) fn copy(rng: &mut Rng) -> Value {
    let request = pick(rng, &["Copy this list", "Repeat this list", "Write this list again"]);
    let (items, _) = items(rng);
    list_case(request, &items, &items)
}

pub(super) fn reverse(rng: &mut Rng) -> Value {
    let request = pick(rng, &["Reverse this list", "Write this list backwards"]);
    let (items, _) = items(rng);
    let reversed: Vec<String> = items.iter().rev().cloned().collect();
    list_case(request, &items, &reversed)
}

pub(super) fn sort(rng: &mut Rng) -> Value {
    let (items, are_numbers) = items(rng);
    let how = if are_numbers { "from small to large" } else { "alphabetically" };
    // Numbers all have two digits, so that their texts sort as they do.
    let mut sorted = items.clone();
    sorted.sort();
    let request = if rng.bool() { format!("Sort this list {how}") } else { format!("Sort {how}") };
    list_case(&request, &items, &sorted)
}

fn sum_case(rng: &mut Rng, x: u32, sign: &str, y: u32, answer: u32) -> Value {
    let prompt = match rng.u32(..3) {
        0 => format!("What is {x} {sign} {y}?"),
        1 => format!("Calculate {x} {sign} {y}."),
        _ => format!("{x} {sign} {y} = ?"),
    };
    single(&prompt, true, json!({ "type": "numeric", "answer": answer }))
}

pub(super) fn add(rng: &mut Rng) -> Value {
    let (x, y) = (rng.u32(1..100), rng.u32(1..100));
    sum_case(rng, x, "+", y, x + y)
}

pub(super) fn subtract(rng: &mut Rng) -> Value {
    let (x, y) = (rng.u32(1..100), rng.u32(1..100));
    let (x, y) = (x.max(y), x.min(y));
    sum_case(rng, x, "-", y, x - y)
}

pub(super) fn multiply(rng: &mut Rng) -> Value {
    let (x, y) = (rng.u32(2..100), rng.u32(2..10));
    sum_case(rng, x, "*", y, x * y)
}

/// Facts about some people, and a question about one of them.
pub(super) fn passage(rng: &mut Rng) -> Value {
    let count = rng.usize(2..=5);
    let people = sample(rng, NAMES, count);
    let (cities, jobs, animals) =
        (sample(rng, CITIES, count), sample(rng, JOBS, count), sample(rng, ANIMALS, count));
    let mut sentences = Vec::new();
    for (i, person) in people.iter().enumerate() {
        sentences.push(format!("{person} lives in {}.", cities[i]));
        sentences.push(format!("{person} works as a {}.", jobs[i]));
        sentences.push(format!("{person} has a {}.", animals[i]));
    }
    let asked = rng.usize(..count);
    let person = people[asked];
    let (question, values) = match rng.u32(..3) {
        0 => (format!("Where does {person} live?"), cities),
        1 => (format!("What is the job of {person}?"), jobs),
        _ => (format!("Which animal does {person} have?"), animals),
    };
    let others: Vec<&str> = values.iter().copied().filter(|v| *v != values[asked]).collect();
    let grade = json!({ "type": "contains", "answer": values[asked], "not": others });
    single(&format!("{}\n\n{question}", sentences.join(" ")), false, grade)
}
