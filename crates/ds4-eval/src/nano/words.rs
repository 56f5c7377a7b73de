//! Words and values for cases.

use fastrand::Rng;

use super::pick;

pub(super) const NAMES: &[&str] = &[
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate",
    "Leo", "Mia", "Noah", "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tara", "Victor", "Wendy", "Zoe",
    "Adam", "Bella", "Carl", "Diana", "Eric", "Fiona", "George", "Helen", "Ivan", "Julia", "Karl",
    "Laura", "Mark", "Nina", "Oscar", "Petra", "Sara", "Tom", "Walter", "Alice", "Robert", "Maria",
    "Peter", "John", "Mary", "James", "Susan", "Linda", "Simon", "Daniel", "Lucy", "Martin",
];

pub(super) const CITIES: &[&str] = &[
    "Oslo", "Paris", "London", "Rome", "Madrid", "Berlin", "Vienna", "Lima", "Cairo", "Tokyo",
    "Delhi", "Athens", "Dublin", "Prague", "Warsaw", "Lisbon", "Boston", "Chicago", "Denver",
    "Toronto", "Sydney", "Moscow", "Seoul", "Geneva", "Milan", "Venice", "Munich", "Austin",
];

pub(super) const COLOURS: &[&str] = &[
    "red", "green", "blue", "yellow", "orange", "purple", "black", "white", "grey", "brown",
    "pink", "silver", "golden",
];

pub(super) const JOBS: &[&str] = &[
    "baker", "teacher", "doctor", "farmer", "painter", "lawyer", "nurse", "pilot", "writer",
    "singer", "gardener", "sailor", "tailor", "cook", "judge", "driver",
];

pub(super) const ANIMALS: &[&str] =
    &["cat", "dog", "horse", "parrot", "rabbit", "hamster", "goat", "pony"];

pub(super) const NOUNS: &[&str] = &[
    "anchor", "apple", "arrow", "bank", "barrel", "basket", "bell", "bench", "bird", "boat",
    "book", "bottle", "box", "bridge", "bucket", "button", "cable", "candle", "carpet", "castle",
    "chair", "circle", "clock", "cloud", "coat", "coin", "cotton", "cup", "desk", "door", "drum",
    "engine", "farm", "feather", "fence", "field", "finger", "flag", "flower", "forest", "fork",
    "garden", "gate", "glass", "hammer", "harbor", "hat", "hill", "island", "jacket", "kettle",
    "key", "kite", "ladder", "lake", "lamp", "leaf", "lemon", "letter", "market", "mirror",
    "monkey", "moon", "mountain", "needle", "ocean", "paper", "pencil", "piano", "pillow", "plate",
    "pocket", "pond", "rabbit", "ring", "river", "road", "roof", "rope", "salt", "school", "shell",
    "ship", "shoe", "silver", "spoon", "spring", "square", "stone", "street", "table", "tent",
    "ticket", "tower", "train", "tree", "tunnel", "valley", "wagon", "wall", "wheel", "window",
    "winter", "wood",
];

pub(super) const VERBS: &[&str] = &[
    "shows",
    "holds",
    "describes",
    "covers",
    "follows",
    "contains",
    "reaches",
    "supports",
    "replaces",
    "needs",
    "changes",
    "keeps",
];

pub(super) const ADJECTIVES: &[&str] = &[
    "old",
    "large",
    "small",
    "common",
    "different",
    "local",
    "simple",
    "narrow",
    "new",
    "single",
    "useful",
    "empty",
    "long",
    "heavy",
    "round",
    "special",
];

/// A number of so many digits.
pub(super) fn number(rng: &mut Rng, digits: u32) -> u32 {
    rng.u32(10u32.pow(digits - 1)..10u32.pow(digits))
}

/// A value that cannot be guessed: a number, a code or two words.
pub(super) fn value(rng: &mut Rng) -> String {
    const LETTERS: &[char] =
        &['A', 'B', 'C', 'D', 'E', 'F', 'G', 'H', 'K', 'L', 'M', 'N', 'P', 'R', 'S', 'T'];
    match rng.u32(..3) {
        0 => number(rng, 4).to_string(),
        1 => {
            let (a, b) = (pick(rng, LETTERS), pick(rng, LETTERS));
            format!("{a}{b}-{}", number(rng, 3))
        }
        _ => format!("{} {}", pick(rng, COLOURS), pick(rng, NOUNS)),
    }
}

/// The name of a file.
pub(super) fn file_name(rng: &mut Rng) -> String {
    let folder = pick(rng, &["", "", "src/", "docs/", "tests/"]);
    let ending = pick(rng, &[".py", ".txt", ".md", ".rs", ".json", ".log"]);
    format!("{folder}{}{ending}", pick(rng, NOUNS))
}
