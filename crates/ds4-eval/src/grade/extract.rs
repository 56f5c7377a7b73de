//! Finds what a text answers.

use std::sync::LazyLock;

use regex::Regex;

/// Places where the answer may be, the likeliest first: the last `Answer:` line, the last LaTeX
/// box, the whole text. One that is empty is none.
pub(super) fn finals(text: &str) -> impl Iterator<Item = &str> {
    let marked = last_answer_line(text).or_else(|| last_box(text));
    // A final line overrules whatever stands before it.
    let whole = if marked.is_some() { None } else { Some(text) };
    marked.into_iter().chain(whole)
}

/// The letter that a text chooses.
pub(super) fn choice(text: &str, options: &str) -> Option<char> {
    if let Some(marked) = last_answer_line(text).or_else(|| last_box(text)) {
        return first_letter(marked, options, Article::Unlikely);
    }
    /// Bytes after the word "answer" in which the letter is looked for.
    const REACH: usize = 96;
    let after_word = ANSWER_WORD.find_iter(text).last().and_then(|word| {
        let rest = &text[word.end()..];
        first_letter(&rest[..rest.floor_char_boundary(REACH)], options, Article::Likely)
    });
    after_word.or_else(|| letters(text, options, Article::Likely).last())
}

/// The number that a text ends with.
pub(super) fn number(text: &str) -> Option<f64> {
    static MARKS: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?").expect("a valid pattern")
    });
    let value = |place: &str| {
        let found = MARKS.find_iter(place).last()?;
        let before = place[..found.start()].chars().next_back();
        let mut digits = found.as_str().replace(',', "").replace('−', "-");
        // A dash right after a word or a number joins; it is no sign.
        if before.is_some_and(char::is_alphanumeric) {
            digits = digits.trim_start_matches('-').to_owned();
        }
        digits.parse().ok()
    };
    // After "Answer:" comes the number, then perhaps an explanation.
    if let Some(marked) = last_answer_line(text) {
        let head = marked.split(['(', ';']).next().unwrap_or(marked);
        return value(head);
    }
    finals(text).find_map(value)
}

/// A text without what it may be dressed in.
pub(super) fn bare(text: &str) -> String {
    const DRESS: [char; 5] = ['*', '`', '"', '\'', '_'];
    let words: Vec<&str> = text.split_whitespace().collect();
    let joined = words.join(" ");
    let mut bare = joined.as_str();
    loop {
        let less = bare.trim_matches(DRESS);
        let less = less.strip_suffix('.').unwrap_or(less).trim();
        if less == bare {
            return bare.to_owned();
        }
        bare = less;
    }
}

/// Whether `words` occur in `text`, in any case, with no letter or digit right beside them.
pub(super) fn has_words(text: &str, words: &str) -> bool {
    let (text, words) = (text.to_lowercase(), words.trim().to_lowercase());
    let beside = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    let mut from = 0;
    while let Some(at) = text[from..].find(&words) {
        let (start, end) = (from + at, from + at + words.len());
        if !beside(text[..start].chars().next_back()) && !beside(text[end..].chars().next()) {
            return true;
        }
        from = start + text[start..].chars().next().map_or(1, char::len_utf8);
    }
    false
}

static ANSWER_WORD: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?i)\banswer\b").expect("a valid pattern"));

/// What follows `Answer:` on the last line that begins with it.
fn last_answer_line(text: &str) -> Option<&str> {
    static LINE: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(?im)^[\s#*_>-]*(?:final\s+)?answer[*_]*\s*:[*_]*[ \t]*(\S.*)$")
            .expect("a valid pattern")
    });
    let found = LINE.captures_iter(text).last()?;
    found.get(1).map(|rest| rest.as_str())
}

/// The content of the last `\boxed{…}`.
fn last_box(text: &str) -> Option<&str> {
    let start = text.rfind(r"\boxed{")? + r"\boxed{".len();
    let mut depth = 1;
    for (at, c) in text[start..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(text[start..start + at].trim()).filter(|inside| !inside.is_empty());
        }
    }
    None
}

/// Whether a letter before a word may be an article.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Article {
    Likely,
    Unlikely,
}

fn first_letter(text: &str, options: &str, article: Article) -> Option<char> {
    // Nothing but a letter counts in either case.
    let inside = text.trim().trim_matches(|c: char| !c.is_alphanumeric());
    let mut only = inside.chars();
    if let (Some(letter), None) = (only.next(), only.next()) {
        return options.chars().find(|option| option.eq_ignore_ascii_case(&letter));
    }
    letters(text, options, article).next()
}

/// Stand-alone option letters in capitals.
fn letters<'a>(
    text: &'a str,
    options: &'a str,
    article: Article,
) -> impl Iterator<Item = char> + 'a {
    let single = text.chars().count() > 0 && text.trim().chars().count() == 1;
    text.char_indices().filter_map(move |(at, c)| {
        let letter = match single {
            true => options.chars().find(|option| option.eq_ignore_ascii_case(&c))?,
            false => options.chars().find(|option| *option == c)?,
        };
        let before = text[..at].chars().next_back();
        let rest = &text[at + c.len_utf8()..];
        let inside = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '\'');
        if inside(before) || inside(rest.chars().next()) {
            return None;
        }
        // "A cat" and "I think" are words.
        let mut following = rest.chars();
        let word_follows =
            following.next() == Some(' ') && following.next().is_some_and(char::is_lowercase);
        let is_word = matches!(c, 'A' | 'I') && word_follows && article == Article::Likely;
        (!is_word).then_some(letter)
    })
}
