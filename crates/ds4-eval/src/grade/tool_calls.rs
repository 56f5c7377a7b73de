//! Tool calls in the text of an answer.

use serde_json::{Map, Value};

const OPEN: &str = "<｜DSML｜tool_calls>";
const CLOSE: &str = "</｜DSML｜tool_calls>";

/// A call of a tool.
#[derive(Debug, Clone, PartialEq)]
pub struct ParsedCall {
    /// Name of the tool.
    pub name: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
}

/// The calls of the blocks in `answer`. A block that isn't complete and well formed has none.
pub fn parse_calls(answer: &str) -> Vec<ParsedCall> {
    let mut calls = Vec::new();
    let mut rest = answer;
    while let Some((_, after)) = rest.split_once(OPEN) {
        let Some((block, after)) = after.split_once(CLOSE) else {
            break;
        };
        calls.extend(parse_block(block).unwrap_or_default());
        rest = after;
    }
    calls
}

fn parse_block(block: &str) -> Option<Vec<ParsedCall>> {
    let mut calls = Vec::new();
    let mut rest = block.trim();
    while !rest.is_empty() {
        let (name, after) = rest.strip_prefix("<｜DSML｜invoke name=\"")?.split_once("\">")?;
        let (parameters, after) = after.split_once("</｜DSML｜invoke>")?;
        calls.push(ParsedCall { name: name.to_owned(), arguments: parse_parameters(parameters)? });
        rest = after.trim_start();
    }
    Some(calls)
}

fn parse_parameters(parameters: &str) -> Option<Map<String, Value>> {
    let mut arguments = Map::new();
    let mut rest = parameters.trim_start();
    while !rest.is_empty() {
        let (name, after) =
            rest.strip_prefix("<｜DSML｜parameter name=\"")?.split_once("\" string=\"")?;
        let (is_string, after) = after.split_once("\">")?;
        let (value, after) = after.split_once("</｜DSML｜parameter>")?;
        let value = match is_string {
            "true" => Value::String(value.to_owned()),
            "false" => serde_json::from_str(value).ok()?,
            _ => return None,
        };
        if arguments.insert(name.to_owned(), value).is_some() {
            return None;
        }
        rest = after.trim_start();
    }
    Some(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_keep_their_line_ends_and_types() {
        let text = "<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"write\">\n\
            <｜DSML｜parameter name=\"text\" string=\"true\">a\n<b>\n</｜DSML｜parameter>\n\
            <｜DSML｜parameter name=\"n\" string=\"false\">[1, null]</｜DSML｜parameter>\n\
            </｜DSML｜invoke>\n<｜DSML｜invoke name=\"list\">\n</｜DSML｜invoke>\n\
            </｜DSML｜tool_calls>";
        let calls = parse_calls(text);
        assert_eq!(calls[0].arguments["text"], "a\n<b>\n");
        assert_eq!(calls[0].arguments["n"], serde_json::json!([1, null]));
        assert_eq!((calls[1].name.as_str(), calls[1].arguments.len()), ("list", 0));
    }

    #[test]
    fn what_is_cut_anywhere_is_no_call() {
        let text = "<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"a\">\n\
            <｜DSML｜parameter name=\"b\" string=\"true\">c</｜DSML｜parameter>\n\
            </｜DSML｜invoke>\n</｜DSML｜tool_calls>";
        assert_eq!(parse_calls(text).len(), 1);
        for end in (0..text.len()).filter(|end| text.is_char_boundary(*end)) {
            assert_eq!(parse_calls(&text[..end]), [], "{end}");
        }
        for bad in ["string=\"maybe\"", "string=\"false\""] {
            assert_eq!(parse_calls(&text.replace("string=\"true\"", bad)), [], "{bad}");
        }
    }
}
