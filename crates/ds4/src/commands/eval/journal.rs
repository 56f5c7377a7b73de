//! The file to which answers are added as they come: one JSON object a line.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow};
use ds4_eval::{Error, runner::Answer};

use crate::terminal;

/// An open file of answers.
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Opens or makes the file, and gives the answers in it. A last line that breaks off is
    /// removed: the program ended while it was written.
    ///
    /// # Errors
    /// If another line is no answer, or the file cannot be read and written.
    pub fn open(path: &Path) -> Result<(Journal, Vec<Answer>)> {
        let name = || path.display().to_string();
        let mut options = OpenOptions::new();
        let mut file =
            options.create(true).read(true).append(true).open(path).with_context(name)?;
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(name)?;
        let (answers, complete) = answers(&text).with_context(name)?;
        if complete < text.len() {
            file.set_len(complete as u64).with_context(name)?;
            terminal::note(format_args!(
                "{}: the last answer breaks off and is given again",
                path.display()
            ));
        } else if !text.is_empty() && !text.ends_with('\n') {
            writeln!(file).with_context(name)?;
        }
        Ok((Journal { path: path.to_owned(), file }, answers))
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn add(&mut self, answer: &Answer) -> ds4_eval::Result<()> {
        let mut line = serde_json::to_string(answer).unwrap_or_default();
        line.push('\n');
        let written = self.file.write_all(line.as_bytes());
        let file = self.path.display().to_string();
        written.map_err(|source| Error::Io { file, source })
    }
}

/// The answers in a text, and the length of the text without a last line that breaks off.
fn answers(text: &str) -> Result<(Vec<Answer>, usize)> {
    let mut answers = Vec::new();
    let mut start = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        match serde_json::from_str(line) {
            Ok(answer) => answers.push(answer),
            Err(_) if line.trim().is_empty() => {}
            Err(error) if error.is_eof() && !line.ends_with('\n') => return Ok((answers, start)),
            Err(error) => {
                return Err(anyhow!(
                    "line {}: not an answer of ds4 eval: {error}: remove the line, or name \
                     another file",
                    index + 1
                ));
            }
        }
        start += line.len();
    }
    Ok((answers, text.len()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const ANSWER: &str = r#"{"id":"1","task":"t","verdict":"right","cut":false,"prompt_tokens":3,"answer_tokens":1,"reasoning":"","answer":"4","case":"00"}"#;

    #[test]
    fn answers_are_added_to_those_that_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers.jsonl");
        // The line end was lost, or a person took it away.
        fs::write(&path, format!("\n{ANSWER}")).unwrap();
        let (mut journal, found) = Journal::open(&path).unwrap();
        assert_eq!(found.len(), 1);
        journal.add(&found[0]).unwrap();
        let (_, found) = Journal::open(&path).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0], found[1]);
    }

    #[test]
    fn an_answer_that_breaks_off_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers.jsonl");
        for end in [1, ANSWER.len() / 2, ANSWER.len() - 1] {
            fs::write(&path, format!("{ANSWER}\n{}", &ANSWER[..end])).unwrap();
            let (_, found) = Journal::open(&path).unwrap();
            assert_eq!(found.len(), 1);
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("{ANSWER}\n"));
        }
    }

    #[test]
    fn other_lines_are_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.txt");
        for other in ["some notes", "{\"id\": 5}\n", "{\"id\":\n"] {
            let text = format!("{ANSWER}\n{other}");
            fs::write(&path, &text).unwrap();
            let error = Journal::open(&path).err().map(|error| format!("{error:#}")).unwrap();
            assert!(error.contains("notes.txt: line 2: not an answer of ds4 eval: "), "{error}");
            assert!(error.ends_with("remove the line, or name another file"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
