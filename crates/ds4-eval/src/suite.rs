//! Suites: cases with a prompt and a way to grade the answer, one JSON object a line.

use std::{collections::HashSet, fs, path::Path};

use ds4_text::{prompt::Conversation, request};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{Error, Result, error::io_error, grade::Grader};

/// Something to be answered and graded.
#[derive(Debug, Clone)]
pub struct Case {
    /// Tells it from all others of its suite.
    pub id: String,
    /// What it tests; results are reported by task.
    pub task: String,
    /// The prompt.
    pub conversation: Conversation,
    /// How the answer is judged.
    pub grader: Grader,
    /// Tokens that the answer may have, if the case says so.
    pub max_tokens: Option<usize>,
    /// A hash of everything above.
    pub hash: [u8; 32],
}

/// The fields of a line that are not those of a chat request.
#[derive(Deserialize)]
struct Line {
    id: Option<String>,
    task: Option<String>,
    /// Short for one message of the user.
    prompt: Option<String>,
    grade: Grader,
    max_tokens: Option<usize>,
}

impl Case {
    /// A case from a JSON object, whose fields are `id`, `task`, `grade`, `max_tokens`, and either
    /// `prompt` or those of a chat request (`messages`, `tools`, `thinking` and so on). `number`
    /// stands for a missing id.
    ///
    /// # Errors
    /// A text that says what is wrong.
    pub fn from_json(mut value: Value, number: usize) -> std::result::Result<Case, String> {
        let hash = *blake3::hash(value.to_string().as_bytes()).as_bytes();
        let line: Line = serde_json::from_value(value.clone()).map_err(|e| e.to_string())?;
        line.grader_check()?;
        match (&line.prompt, value.get("messages").is_some()) {
            (Some(prompt), false) => {
                value["messages"] = json!([{ "role": "user", "content": prompt }]);
            }
            (None, true) => {}
            _ => return Err("expected either a prompt or messages".to_owned()),
        }
        let request = request::chat::read(value).map_err(|e| e.to_string())?;
        Ok(Case {
            id: line.id.unwrap_or_else(|| number.to_string()),
            task: line.task.unwrap_or_else(|| "all".to_owned()),
            conversation: request.converted.conversation,
            grader: line.grade,
            max_tokens: line.max_tokens,
            hash,
        })
    }
}

impl Line {
    fn grader_check(&self) -> std::result::Result<(), String> {
        self.grade.check().map_err(|problem| format!("grade: {problem}"))
    }
}

/// Reads a suite; empty lines don't count.
///
/// # Errors
/// If the file cannot be read, a line is no case, or two have one id.
pub fn read(path: &Path) -> Result<Vec<Case>> {
    let text = fs::read_to_string(path).map_err(io_error(path))?;
    let mut cases = Vec::new();
    let mut ids = HashSet::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() {
            continue;
        }
        let wrong =
            |problem| Error::Line { file: path.display().to_string(), line: number, problem };
        let value = serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
        let case = Case::from_json(value, number).map_err(wrong)?;
        if !ids.insert(case.id.clone()) {
            return Err(wrong(format!("id {:?}: found before", case.id)));
        }
        cases.push(case);
    }
    if cases.is_empty() {
        let problem = "found no cases, expected at least one".to_owned();
        return Err(Error::Line { file: path.display().to_string(), line: 1, problem });
    }
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let message = read(file.path()).unwrap_err().to_string();
        message.replace(&file.path().display().to_string(), "s.jsonl")
    }

    #[test]
    fn cases_are_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = r#"
            {"prompt": "2+2?", "thinking": false, "grade": {"type": "numeric", "answer": 4}}

            {"id": "w", "task": "tools", "max_tokens": 99,
             "messages": [{"role": "user", "content": "Weather in Oslo?"}],
             "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
             "grade": {"type": "tool_call", "name": "weather", "arguments": {"city": "Oslo"}}}
        "#;
        let lines = text.replace("\n             ", " ");
        fs::write(file.path(), lines).unwrap();
        let cases = read(file.path()).unwrap();
        assert_eq!((cases[0].id.as_str(), cases[0].task.as_str()), ("2", "all"));
        assert_eq!((cases[1].id.as_str(), cases[1].task.as_str()), ("w", "tools"));
        assert_eq!((cases[1].max_tokens, cases[1].conversation.tools.len()), (Some(99), 1));
        assert_ne!(cases[0].hash, cases[1].hash);
    }

    #[test]
    fn bad_lines_are_named() {
        let grade = r#""grade": {"type": "exact", "answer": "x"}"#;
        let prompt = r#""prompt": "p""#;
        assert!(message("").ends_with("found no cases, expected at least one"));
        assert!(message("\n{").starts_with("s.jsonl:2: EOF"));
        assert!(message("[]").starts_with("s.jsonl:1: "));
        assert!(message(&format!("{{{prompt}}}")).contains("missing field `grade`"));
        let both = format!(r#"{{{prompt}, "messages": [], {grade}}}"#);
        let either = "s.jsonl:1: expected either a prompt or messages";
        assert_eq!(message(&both), either);
        assert_eq!(message(&format!("{{{grade}}}")), either);
        assert!(message(&format!(r#"{{"messages": [], {grade}}}"#)).contains("messages"));
        let unknown = format!(r#"{{{prompt}, "grade": {{"type": "magic"}}}}"#);
        assert!(message(&unknown).contains("unknown variant `magic`"));
        let regex = format!(r#"{{{prompt}, "grade": {{"type": "regex", "pattern": "("}}}}"#);
        assert!(message(&regex).contains("grade: pattern: regex parse error"));
        let twice = format!(r#"{{"id": "a", {prompt}, {grade}}}"#);
        assert_eq!(message(&format!("{twice}\n{twice}")), r#"s.jsonl:2: id "a": found before"#);
    }
}
