//! A block of tool calls, as DeepSeek's models write it:
//!
//! ```text
//! <｜DSML｜tool_calls>
//! <｜DSML｜invoke name="NAME">
//! <｜DSML｜parameter name="KEY" string="true|false">VALUE</｜DSML｜parameter>
//! </｜DSML｜invoke>
//! </｜DSML｜tool_calls>
//! ```
//!
//! Tags, declared names and the order of things are fixed text with alternatives. The value of a
//! parameter is text up to `</` and the marker, or JSON. So a block that ends is well-formed and
//! in the form that prompt rendering would give it.

use std::sync::Arc;

use ds4_engine::TokenId;
use llguidance::Matcher;

use super::{
    compiler::{self, Grammars},
    mask::Next,
    template::{Choice, Piece, Template, pieces},
    tool_set::{Parameter, TextRule, Tool, ToolSet},
};

/// How a value ends: `</` and the marker.
const CLOSER: &[u8] = b"</";

/// Follows a block.
pub(super) struct ToolBlock {
    tools: Arc<ToolSet>,
    state: State,
    /// The call that is open: its tool, and which declared parameters it has.
    tool: usize,
    given: Vec<bool>,
}

enum State {
    Template(Template<Step>),
    Name(usize),
    Text(TextValue),
    Json(JsonValue),
}

/// What a fixed text leads to.
#[derive(Debug, Clone)]
enum Step {
    Opened,
    Call(usize),
    /// A declared parameter, as text or JSON.
    Value(usize, bool),
    /// A declared parameter whose whole text was among the alternatives.
    Given(usize),
    /// The name of an undeclared parameter.
    Undeclared,
    UndeclaredValue(bool),
    ValueClosed,
    CallClosed,
    BlockClosed,
}

struct TextValue {
    matcher: Option<Matcher>,
    /// The newest bytes are `</`, so that the marker would end the value.
    may_close: bool,
    /// Whether the text as it was before `</` may be the whole.
    complete: bool,
    /// Whether `</` fits into the text too.
    goes_on: bool,
}

struct JsonValue {
    matcher: Matcher,
    in_string: bool,
    escaped: bool,
}

impl ToolBlock {
    /// After `<` and the marker of the opening tag.
    pub(super) fn begun(tools: Arc<ToolSet>) -> Self {
        let opening = vec![choice("tool_calls>\n", Step::Opened)];
        let state = State::Template(Template::new(opening));
        ToolBlock { tools, state, tool: 0, given: Vec::new() }
    }

    /// After the opening tag.
    pub(super) fn opened(tools: Arc<ToolSet>) -> Self {
        let mut block = Self::begun(tools);
        block.state = block.between_calls(true);
        block
    }

    /// The tokens that must come next.
    pub(super) fn forced(&mut self, grammars: &Grammars) -> Vec<TokenId> {
        match &mut self.state {
            State::Template(template) => template.forced(grammars),
            State::Name(_) | State::Text(_) => Vec::new(),
            State::Json(value) => value.forced(),
        }
    }

    /// What may come next, if nothing is forced.
    pub(super) fn next_mask(&mut self, grammars: &Grammars) -> Result<Next, String> {
        match &mut self.state {
            State::Template(template) => {
                Ok(Next::Among { mask: template.mask(grammars), greedy: true })
            }
            State::Name(length) => {
                let mut mask = grammars.name().clone();
                if *length > 0 {
                    grammars.allow_prefixes(&mut mask, b"\"");
                }
                Ok(Next::Among { mask, greedy: false })
            }
            State::Text(value) => value.next_mask(grammars),
            State::Json(value) => value.next_mask(grammars),
        }
    }

    /// Takes in a token; true if the block is complete.
    pub(super) fn accept(&mut self, grammars: &Grammars, token: TokenId) -> Result<bool, String> {
        let is_dsml = token == grammars.special().dsml;
        match &mut self.state {
            State::Template(template) => {
                if let Some(step) = template.accept(grammars, token) {
                    return Ok(self.step(step));
                }
            }
            State::Name(length) => {
                let bytes = grammars.bytes_of(token);
                *length += bytes.len();
                if bytes == b"\"" {
                    let ways = [("true", true), ("false", false)].map(|(word, text)| {
                        choice(&format!(" string=\"{word}\">"), Step::UndeclaredValue(text))
                    });
                    self.state = State::Template(Template::new(ways.into()));
                }
            }
            State::Text(_) if is_dsml => self.close_value("parameter>\n"),
            State::Text(value) => value.accept(grammars.bytes_of(token), token)?,
            State::Json(value) => {
                if grammars.bytes_of(token) == CLOSER && value.may_end() {
                    self.close_value("｜parameter>\n");
                } else if value.accept(grammars.bytes_of(token), token)? {
                    self.close_value("</｜parameter>\n");
                }
            }
        }
        Ok(false)
    }

    fn close_value(&mut self, rest: &str) {
        self.state = State::Template(Template::new(vec![choice(rest, Step::ValueClosed)]));
    }

    /// Goes on after a fixed text; true if it was the last.
    fn step(&mut self, step: Step) -> bool {
        self.state = match step {
            Step::BlockClosed => return true,
            Step::Opened => self.between_calls(true),
            Step::CallClosed => self.between_calls(false),
            Step::Call(tool) => {
                self.tool = tool;
                self.given = vec![false; self.open_tool().parameters.len()];
                self.between_parameters()
            }
            Step::Given(parameter) => {
                self.given[parameter] = true;
                self.between_parameters()
            }
            Step::Value(parameter, is_text) => {
                self.given[parameter] = true;
                let parameter = &self.open_tool().parameters[parameter];
                match (is_text, &parameter.text, &parameter.json) {
                    (false, _, Some(json)) => State::Json(JsonValue::new(json.matcher())),
                    (_, Some(TextRule::Matching(grammar)), _) => {
                        State::Text(TextValue::new(Some(grammar.matcher())))
                    }
                    _ => State::Text(TextValue::new(None)),
                }
            }
            Step::Undeclared => State::Name(0),
            Step::UndeclaredValue(true) => State::Text(TextValue::new(None)),
            Step::UndeclaredValue(false) => match &self.tools.any_json {
                Some(json) => State::Json(JsonValue::new(json.matcher())),
                None => State::Text(TextValue::new(None)),
            },
            Step::ValueClosed => self.between_parameters(),
        };
        false
    }

    fn open_tool(&self) -> &Tool {
        &self.tools.tools[self.tool]
    }

    /// The next call, or the end of the block.
    fn between_calls(&self, first: bool) -> State {
        let mut choices = Vec::new();
        if first || self.tools.parallel {
            choices.extend(self.tools.tools.iter().enumerate().map(|(index, tool)| {
                let mut pieces = pieces("<｜invoke name=\"");
                pieces.push(Piece::Text(format!("{}\">\n", tool.name)));
                Choice { pieces, meaning: Step::Call(index) }
            }));
        }
        if !first {
            choices.push(choice("</｜tool_calls>", Step::BlockClosed));
        }
        State::Template(Template::new(choices))
    }

    /// The next parameter, or the end of the call.
    fn between_parameters(&self) -> State {
        let tool = self.open_tool();
        let mut choices = Vec::new();
        let mut lacks_required = false;
        for (index, parameter) in tool.parameters.iter().enumerate() {
            if !self.given[index] {
                lacks_required |= parameter.required;
                parameter_choices(index, parameter, &mut choices);
            }
        }
        if tool.open && tool.parameters.is_empty() {
            choices.push(choice("<｜parameter name=\"", Step::Undeclared));
        }
        if !lacks_required {
            choices.push(choice("</｜invoke>\n", Step::CallClosed));
        }
        State::Template(Template::new(choices))
    }
}

fn parameter_choices(index: usize, parameter: &Parameter, choices: &mut Vec<Choice<Step>>) {
    let tag = |is_text: bool| {
        let mut pieces = pieces("<｜parameter name=\"");
        pieces.push(Piece::Text(format!("{}\" string=\"{is_text}\">", parameter.name)));
        pieces
    };
    match &parameter.text {
        Some(TextRule::OneOf(texts)) => choices.extend(texts.iter().map(|text| {
            let mut all = tag(true);
            // Text and tag are one stretch, which the tokenizer may split anywhere.
            all.push(Piece::Text(format!("{text}</")));
            all.extend(pieces("｜parameter>\n"));
            Choice { pieces: all, meaning: Step::Given(index) }
        })),
        Some(_) => choices.push(Choice { pieces: tag(true), meaning: Step::Value(index, true) }),
        None => {}
    }
    if parameter.json.is_some() {
        choices.push(Choice { pieces: tag(false), meaning: Step::Value(index, false) });
    }
}

fn choice(text: &str, meaning: Step) -> Choice<Step> {
    Choice { pieces: pieces(text), meaning }
}

impl TextValue {
    fn new(mut matcher: Option<Matcher>) -> Self {
        let complete = matcher.as_mut().is_none_or(|m| m.is_accepting().unwrap_or(false));
        TextValue { matcher, may_close: false, complete, goes_on: true }
    }

    fn next_mask(&mut self, grammars: &Grammars) -> Result<Next, String> {
        let mut mask = match &mut self.matcher {
            None => grammars.text().clone(),
            Some(matcher) if self.goes_on && !matcher.is_stopped() => {
                let mut mask = compiler::mask(matcher)?;
                mask.and(grammars.text());
                mask
            }
            Some(_) => grammars.nothing(),
        };
        if self.may_close {
            mask.allow_token(grammars.special().dsml);
        } else if self.complete {
            mask.or(grammars.closer());
        }
        Ok(Next::Among { mask, greedy: self.may_close })
    }

    fn accept(&mut self, bytes: &[u8], token: TokenId) -> Result<(), String> {
        let Some(matcher) = &mut self.matcher else {
            self.may_close = bytes.ends_with(CLOSER);
            return Ok(());
        };
        let was_complete = matcher.is_accepting().unwrap_or(false);
        self.goes_on = matcher.try_consume_tokens(&[token]).is_ok_and(|taken| taken == 1);
        self.may_close = was_complete && bytes == CLOSER;
        self.complete = matcher.is_accepting().unwrap_or(false);
        Ok(())
    }
}

impl JsonValue {
    fn new(matcher: Matcher) -> Self {
        JsonValue { matcher, in_string: false, escaped: false }
    }

    /// Whether the value may end here.
    fn may_end(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(false)
    }

    fn forced(&mut self) -> Vec<TokenId> {
        if self.may_end() { Vec::new() } else { compiler::forced(&mut self.matcher) }
    }

    fn next_mask(&mut self, grammars: &Grammars) -> Result<Next, String> {
        let mut mask = compiler::mask(&mut self.matcher)?;
        if !self.may_end() {
            return Ok(Next::Among { mask, greedy: !self.in_string });
        }
        mask.and(grammars.text());
        mask.or(grammars.closer());
        Ok(Next::Among { mask, greedy: true })
    }

    /// Takes in a token; true if the value can only end.
    fn accept(&mut self, bytes: &[u8], token: TokenId) -> Result<bool, String> {
        for byte in bytes {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ => {}
            }
        }
        compiler::consume(&mut self.matcher, token)
    }
}
