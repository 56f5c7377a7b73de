//! Graders: whether an answer is right.
//!
//! They look at the answer without its reasoning. Models rarely answer with nothing but the
//! answer, so each grader looks first at the last line that begins with `Answer:`, then at a
//! LaTeX box, and only then at the text as a whole.

mod extract;
mod tool_calls;

use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value};

pub use tool_calls::{ParsedCall, parse_calls};

/// How answers to a case are judged.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Grader {
    /// One of several options by its letter.
    Choice {
        /// The right letter.
        answer: char,
        /// Letters of all options.
        #[serde(default = "four_options")]
        options: String,
    },
    /// The answer and nothing else, but for white space, quotes, emphasis and a full stop.
    Exact {
        /// What is right: a text, or any of several.
        answer: Texts,
    },
    /// A number.
    Numeric {
        /// The right one.
        answer: f64,
        /// How far off is still right.
        #[serde(default)]
        tolerance: f64,
    },
    /// One call of a tool, with its name and all of its arguments.
    ToolCall {
        /// Name of the tool.
        name: String,
        /// Arguments, in any order.
        arguments: Map<String, Value>,
    },
    /// A match anywhere in the answer.
    Regex {
        /// The regular expression.
        pattern: String,
    },
    /// Texts anywhere in the answer, as whole words, in any case.
    Contains {
        /// What must be there, all of it.
        answer: Texts,
        /// What must not.
        #[serde(default)]
        not: Vec<String>,
    },
}

/// A text or several.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Texts {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

fn four_options() -> String {
    "ABCD".to_owned()
}

impl Grader {
    /// Whether the grader itself makes sense.
    ///
    /// # Errors
    /// A text that says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Grader::Choice { answer, options } if !options.contains(*answer) => {
                Err(format!("answer: found {answer:?}, expected one of {options:?}"))
            }
            Grader::Numeric { answer, tolerance }
                if !answer.is_finite() || tolerance.is_nan() || *tolerance < 0.0 =>
            {
                Err("expected a finite answer and a tolerance of at least 0".to_owned())
            }
            Grader::Regex { pattern } => {
                Regex::new(pattern).map(drop).map_err(|error| format!("pattern: {error}"))
            }
            Grader::Exact { answer } | Grader::Contains { answer, .. }
                if answer.all().iter().all(|text| text.trim().is_empty()) =>
            {
                Err("answer: found nothing, expected a text".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// Whether `answer`, the text after the reasoning, is right.
    pub fn is_right(&self, answer: &str) -> bool {
        match self {
            Grader::Choice { answer: letter, options } => {
                extract::choice(answer, options) == Some(*letter)
            }
            Grader::Exact { answer: texts } => {
                let texts: Vec<_> = texts.all().iter().map(|text| extract::bare(text)).collect();
                extract::finals(answer).any(|found| texts.contains(&extract::bare(found)))
            }
            Grader::Numeric { answer: number, tolerance } => {
                let close = |found: f64| (found - number).abs() <= *tolerance;
                extract::number(answer).is_some_and(close)
            }
            Grader::ToolCall { name, arguments } => match parse_calls(answer).as_slice() {
                [call] => call.name == *name && same_arguments(&call.arguments, arguments),
                _ => false,
            },
            Grader::Regex { pattern } => {
                Regex::new(pattern).is_ok_and(|pattern| pattern.is_match(answer))
            }
            Grader::Contains { answer: texts, not } => {
                texts.all().iter().all(|text| extract::has_words(answer, text))
                    && !not.iter().any(|text| extract::has_words(answer, text))
            }
        }
    }
}

impl Texts {
    fn all(&self) -> &[String] {
        match self {
            Texts::One(text) => std::slice::from_ref(text),
            Texts::Several(texts) => texts,
        }
    }
}

/// Whether two sets of arguments are equal, numbers by their value.
fn same_arguments(found: &Map<String, Value>, expected: &Map<String, Value>) -> bool {
    let same = |(key, value): (&String, &Value)| found.get(key).is_some_and(|v| same(v, value));
    found.len() == expected.len() && expected.iter().all(same)
}

fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => same_arguments(a, b),
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn grader(json: Value) -> Grader {
        let grader: Grader = serde_json::from_value(json).unwrap();
        grader.check().unwrap();
        grader
    }

    fn judge(json: Value, right: &[&str], wrong: &[&str]) {
        let grader = grader(json);
        for answer in right {
            assert!(grader.is_right(answer), "{grader:?} refuses {answer:?}");
        }
        for answer in wrong {
            assert!(!grader.is_right(answer), "{grader:?} accepts {answer:?}");
        }
    }

    #[test]
    fn choices_are_found_in_prose() {
        judge(
            json!({"type": "choice", "answer": "C"}),
            &[
                "C",
                "(C)",
                "c",
                "Answer: C",
                "**Answer:** (C) because",
                "The answer is C.",
                "A tempting answer at first is B.\nAnswer: C",
                "Option A is wrong, B too. So C.",
                "The correct answer is **C**: a cat.",
                "\\boxed{C}",
                "answer: c",
                "C) Paris",
            ],
            &[
                "",
                "A",
                "Answer: D",
                "C is tempting.\nAnswer: B",
                "The answer is not clear",
                "Answer: ABC",
                "CAT",
                "E",
            ],
        );
        // The article is no choice, and a word before the final line is no verdict.
        judge(
            json!({"type": "choice", "answer": "A"}),
            &["A", "Answer: A", "It is A."],
            &["A dog is an animal.", "The answer is a dog.", "The answer: B. A cat is not."],
        );
        judge(
            json!({"type": "choice", "answer": "J", "options": "ABCDEFGHIJ"}),
            &["Answer: J", "J"],
            &["I think it is B", "Answer: I"],
        );
    }

    #[test]
    fn numbers_are_found_and_compared_by_value() {
        judge(
            json!({"type": "numeric", "answer": 72}),
            &[
                "72",
                "47 + 25 = 72",
                "The answer is 72.",
                "072",
                "72.0",
                "Answer: 72\n(47 and 25)",
                "\\boxed{72}",
                "**72**",
                "It costs $72.",
                "7 + 65 is seventy-two: 72",
            ],
            &["", "7", "172", "-72", "72 - 1 = 71", "Answer: 71 (not 72)... Answer: 71", "7 2"],
        );
        judge(
            json!({"type": "numeric", "answer": -1234.5, "tolerance": 0.1}),
            &["-1,234.5", "−1234.45", "x = -1234.6"],
            &["1234.5", "-1234.7"],
        );
        // A dash between two things is no sign.
        judge(json!({"type": "numeric", "answer": 30}), &["10-30", "pages 10–30"], &["-30"]);
    }

    #[test]
    fn exact_answers_may_be_dressed_but_not_longer() {
        judge(
            json!({"type": "exact", "answer": ["4, 7, 9", "4 7 9"]}),
            &[
                "4, 7, 9",
                " 4,  7, 9.\n",
                "**4 7 9**",
                "`4, 7, 9`",
                "\"4, 7, 9\"",
                "Sorted, it is as follows.\nAnswer: 4, 7, 9",
            ],
            &["", "4, 7", "4, 7, 9, 10", "The list is 4, 7, 9", "4,7,9", "Answer: 4, 7"],
        );
        judge(json!({"type": "exact", "answer": "Oslo"}), &["Oslo"], &["oslo", "Oslo!"]);
    }

    #[test]
    fn contained_answers_are_whole_words() {
        judge(
            json!({"type": "contains", "answer": ["AB-12", "kitchen"], "not": ["CD-99"]}),
            &["The code for kitchen is AB-12.", "KITCHEN: ab-12"],
            &["AB-12", "kitchen AB-123", "kitchens AB-12", "kitchen AB-12 or CD-99"],
        );
        judge(json!({"type": "contains", "answer": "é"}), &["un é."], &["né", "éa"]);
    }

    #[test]
    fn patterns_match_anywhere() {
        judge(json!({"type": "regex", "pattern": "^a+$"}), &["aa"], &["ab", ""]);
        judge(json!({"type": "regex", "pattern": "(?i)yes|no"}), &["Oh YES!"], &["maybe"]);
    }

    #[test]
    fn tool_calls_need_the_name_and_all_arguments() {
        let call = |name: &str, parameters: &str| {
            format!(
                "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"{name}\">\n{parameters}\
                 </｜DSML｜invoke>\n</｜DSML｜tool_calls>"
            )
        };
        let parameter = |name: &str, string: bool, value: &str| {
            format!(
                "<｜DSML｜parameter name=\"{name}\" string=\"{string}\">{value}</｜DSML｜parameter>\n"
            )
        };
        let (city, days) = (parameter("city", true, "Oslo"), parameter("days", false, "2"));
        let right = call("weather", &format!("{city}{days}"));
        judge(
            json!({"type": "tool_call", "name": "weather", "arguments": {"city": "Oslo", "days": 2}}),
            &[
                &right,
                &format!("I look.{right}"),
                &call("weather", &format!("{days}{city}")),
                &call("weather", &format!("{city}{}", parameter("days", false, "2.0"))),
            ],
            &[
                "",
                "weather(city=Oslo, days=2)",
                &call("clock", &format!("{city}{days}")),
                &call("weather", &city),
                &call("weather", &format!("{city}{}", parameter("days", true, "2"))),
                &call("weather", &format!("{city}{days}{}", parameter("unit", true, "C"))),
                &right[..right.len() - 4],
                &format!("{right}{right}"),
                &right.replace(
                    "</｜DSML｜invoke>\n",
                    "</｜DSML｜invoke>\n<｜DSML｜invoke name=\"clock\">\n</｜DSML｜invoke>\n",
                ),
            ],
        );
    }

    #[test]
    fn graders_that_make_no_sense_are_refused() {
        for bad in [
            json!({"type": "choice", "answer": "E"}),
            json!({"type": "numeric", "answer": 1, "tolerance": -1}),
            json!({"type": "exact", "answer": " "}),
            json!({"type": "contains", "answer": []}),
        ] {
            assert!(serde_json::from_value::<Grader>(bad).unwrap().check().is_err());
        }
        let typo = json!({"type": "numeric", "answer": 1, "tolerence": 1});
        assert!(serde_json::from_value::<Grader>(typo).is_err());
    }
}
