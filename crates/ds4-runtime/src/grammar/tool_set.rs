//! The tools of a request, as rules for the values of their parameters.

use std::sync::Arc;

use deepseek_recipe_core::tools::ToolDefinition;
use serde_json::{Map, Value, json};

use super::compiler::{Grammar, GrammarError, Grammars};

/// References that are followed to find a schema's types.
const DEEPEST: usize = 16;

/// Types of values that are no texts.
const OTHERS: [&str; 5] = ["object", "array", "number", "boolean", "null"];

/// Tools that may be called.
pub struct ToolSet {
    pub(super) tools: Vec<Tool>,
    /// Several calls may be made at once.
    pub(super) parallel: bool,
    /// Values of parameters that are not declared.
    pub(super) any_json: Option<Grammar>,
}

/// A tool.
pub(super) struct Tool {
    pub(super) name: String,
    pub(super) parameters: Vec<Parameter>,
    /// Parameters that are not declared may be given.
    pub(super) open: bool,
}

/// A declared parameter. It takes text, JSON or either.
pub(super) struct Parameter {
    pub(super) name: String,
    pub(super) required: bool,
    pub(super) text: Option<TextRule>,
    pub(super) json: Option<Grammar>,
}

/// What a text may be.
#[derive(Clone)]
pub(super) enum TextRule {
    Any,
    OneOf(Vec<String>),
    Matching(Grammar),
}

impl ToolSet {
    /// Compiles the rules for `tools`, of which only `named` may be called if that is given.
    ///
    /// # Errors
    /// If a strict tool's schema has parts that cannot be enforced; other tools' values are then
    /// any JSON.
    pub fn compile(
        grammars: &Grammars,
        tools: &[ToolDefinition],
        named: Option<&str>,
        parallel: bool,
    ) -> Result<Arc<Self>, GrammarError> {
        let callable = tools.iter().filter(|tool| named.is_none_or(|name| name == tool.name));
        let tools: Vec<_> =
            callable.map(|tool| compile(grammars, tool)).collect::<Result<_, _>>()?;
        if tools.is_empty() {
            return Err(GrammarError("there is no tool that may be called".to_owned()));
        }
        let open = tools.iter().any(|tool| tool.open);
        let any_json =
            open.then(|| grammars.json_schema(&json!({ "type": OTHERS }))).transpose()?;
        Ok(Arc::new(ToolSet { tools, parallel, any_json }))
    }
}

fn compile(grammars: &Grammars, tool: &ToolDefinition) -> Result<Tool, GrammarError> {
    let schema = &tool.parameters;
    let no_properties = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object);
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .map(|names| names.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let open = match schema.get("additionalProperties") {
        None => properties.is_none(),
        Some(additional) => additional != &Value::Bool(false),
    };
    let properties = properties.unwrap_or(&no_properties);
    let odd = properties.keys().find(|name| !is_writable(name));
    if let Some(name) = odd.filter(|_| tool.strict == Some(true)) {
        let tool = &tool.name;
        return Err(GrammarError(format!("tool {tool}: a call cannot name a parameter {name:?}")));
    }
    let properties = properties.iter().filter(|(name, _)| is_writable(name));
    let parameters = properties.map(|(name, property)| {
        let source = Source { grammars, tool, property };
        let required = required.contains(&name.as_str());
        source.parameter(name, required)
    });
    let parameters = parameters.collect::<Result<_, _>>()?;
    Ok(Tool { name: tool.name.clone(), parameters, open })
}

/// Whether a parameter's name can stand in a tag: the format has no escapes for quotes, and its
/// parser ends a name at a space.
fn is_writable(name: &str) -> bool {
    let fits = |c: char| !c.is_control() && !c.is_whitespace() && !"\"\\<>｜".contains(c);
    !name.is_empty() && name.chars().all(fits)
}

/// A schema as strict mode means it: every object has all of its properties and no others.
/// DeepSeek's conversion does the same, but drops what it does not know, such as `minItems`.
pub fn strictly(mut schema: Value) -> Value {
    match &mut schema {
        Value::Object(fields) => {
            let names = fields.get("properties").and_then(Value::as_object);
            let names: Option<Vec<String>> = names.map(|names| names.keys().cloned().collect());
            if let Some(names) = names {
                fields.insert("required".to_owned(), json!(names));
                fields.insert("additionalProperties".to_owned(), json!(false));
            }
            // A constant may look like a schema, and is none.
            for (_, value) in fields.iter_mut().filter(|(key, _)| {
                !matches!(key.as_str(), "const" | "enum" | "default" | "required")
            }) {
                *value = strictly(value.take());
            }
        }
        Value::Array(values) => {
            values.iter_mut().for_each(|value| *value = strictly(value.take()));
        }
        _ => {}
    }
    schema
}

/// A property of a tool's schema.
struct Source<'a> {
    grammars: &'a Grammars,
    tool: &'a ToolDefinition,
    property: &'a Value,
}

impl Source<'_> {
    fn parameter(&self, name: &str, required: bool) -> Result<Parameter, GrammarError> {
        let kinds = self.kinds(self.property, 0);
        let text = kinds.text.then(|| self.text_rule(self.property, 0)).transpose()?;
        let json = (kinds.other || !kinds.text).then(|| self.json(kinds.text)).transpose()?;
        Ok(Parameter { name: name.to_owned(), required, text, json })
    }

    /// What types of values a schema takes.
    fn kinds(&self, schema: &Value, depth: usize) -> Kinds {
        let either = Kinds { text: true, other: true };
        let Some(schema) = schema.as_object().filter(|_| depth < DEEPEST) else { return either };
        if let Some(target) = schema.get("$ref").and_then(Value::as_str) {
            let pointer = target.strip_prefix('#').unwrap_or_default();
            let target = self.tool.parameters.pointer(pointer);
            return target.map_or(either, |target| self.kinds(target, depth + 1));
        }
        let all = |values: &[Value], kinds: &dyn Fn(&Value) -> Kinds| {
            values.iter().map(kinds).fold(Kinds::default(), Kinds::or)
        };
        if let Some(value) = schema.get("const") {
            return Kinds::of_value(value);
        }
        if let Some(values) = schema.get("enum").and_then(Value::as_array) {
            return all(values, &Kinds::of_value);
        }
        match schema.get("type") {
            Some(Value::String(name)) => return Kinds::of_type(name),
            Some(Value::Array(names)) => {
                return all(names, &|name| Kinds::of_type(name.as_str().unwrap_or_default()));
            }
            _ => {}
        }
        let alternatives = ["anyOf", "oneOf"].iter().find_map(|key| schema.get(*key)?.as_array());
        alternatives.map_or(either, |some| all(some, &|one| self.kinds(one, depth + 1)))
    }

    /// What texts a schema takes, through references and alternatives.
    fn text_rule(&self, schema: &Value, depth: usize) -> Result<TextRule, GrammarError> {
        if depth > DEEPEST {
            return self.told(Err(GrammarError("references without end".to_owned())));
        }
        if let Some(target) = schema.get("$ref").and_then(Value::as_str) {
            let pointer = target.strip_prefix('#').unwrap_or_default();
            return match self.tool.parameters.pointer(pointer) {
                Some(target) => self.text_rule(target, depth + 1),
                None => self.told(Err(GrammarError(format!("nothing is at {target}")))),
            };
        }
        if let Some(some) = ["anyOf", "oneOf"].iter().find_map(|key| schema.get(*key)?.as_array()) {
            let texts = some.iter().filter(|one| self.kinds(one, depth + 1).text);
            let rules = texts.map(|one| self.text_rule(one, depth + 1));
            let rules = rules.collect::<Result<Vec<_>, _>>()?;
            let either = rules.into_iter().map(Some).reduce(|a, b| TextRule::either(a?, b?));
            let several = || GrammarError("alternatives of texts".to_owned());
            return self.told(either.unwrap_or(Some(TextRule::Any)).ok_or_else(several));
        }
        let values = match (schema.get("const"), schema.get("enum")) {
            (Some(value), _) => Some(std::slice::from_ref(value)),
            (None, Some(Value::Array(values))) => Some(&values[..]),
            _ => None,
        };
        if let Some(values) = values {
            let texts = values.iter().filter_map(Value::as_str).map(str::to_owned).collect();
            return Ok(TextRule::OneOf(texts));
        }
        if self.tool.strict != Some(true) {
            return Ok(TextRule::Any);
        }
        match text_expression(schema) {
            Ok(None) => Ok(TextRule::Any),
            Ok(Some(expression)) => {
                self.told(self.grammars.regex(&expression)).map(TextRule::Matching)
            }
            Err(error) => self.told(Err(error)),
        }
    }

    /// The grammar of values that are no texts.
    fn json(&self, takes_text: bool) -> Result<Grammar, GrammarError> {
        let mut schema = match self.property {
            Value::Object(schema) => schema.clone(),
            _ => Map::new(),
        };
        if takes_text {
            let says_otherwise = ["anyOf", "oneOf", "$ref", "enum", "const"]
                .iter()
                .any(|key| schema.contains_key(*key));
            match schema.get_mut("type") {
                Some(Value::Array(names)) => names.retain(|name| name != "string"),
                None if !says_otherwise => {
                    schema.insert("type".to_owned(), json!(OTHERS));
                }
                _ => {}
            }
            if let Some(Value::Array(values)) = schema.get_mut("enum") {
                values.retain(|value| !value.is_string());
            }
        }
        for key in ["$defs", "definitions"] {
            if let Some(definitions) = self.tool.parameters.get(key) {
                schema.entry(key).or_insert_with(|| definitions.clone());
            }
        }
        match self.grammars.json_schema(&Value::Object(schema)) {
            Err(_) if self.tool.strict != Some(true) => {
                self.grammars.json_schema(&json!({ "type": OTHERS }))
            }
            compiled => self.told(compiled),
        }
    }

    fn told<T>(&self, result: Result<T, GrammarError>) -> Result<T, GrammarError> {
        result.map_err(|GrammarError(reason)| {
            GrammarError(format!(
                "tool {}: this schema cannot be enforced: {reason}",
                self.tool.name
            ))
        })
    }
}

impl TextRule {
    /// Texts that fit one of two rules, where that is simple.
    fn either(a: TextRule, b: TextRule) -> Option<TextRule> {
        match (a, b) {
            (TextRule::OneOf(a), TextRule::OneOf(b)) => Some(TextRule::OneOf([a, b].concat())),
            (TextRule::Any, _) | (_, TextRule::Any) => Some(TextRule::Any),
            _ => None,
        }
    }
}

/// A text's pattern or length as an expression for all of it.
fn text_expression(schema: &Value) -> Result<Option<String>, GrammarError> {
    let length = |key| schema.get(key).and_then(Value::as_u64);
    let pattern = schema.get("pattern").and_then(Value::as_str);
    match (pattern, length("minLength"), length("maxLength")) {
        (None, None, None) => Ok(None),
        (Some(pattern), None, None) => {
            let start = if pattern.starts_with('^') { "" } else { "(?s:.*)" };
            let end = if pattern.ends_with('$') { "" } else { "(?s:.*)" };
            let bare = pattern.strip_prefix('^').unwrap_or(pattern);
            let bare = bare.strip_suffix('$').unwrap_or(bare);
            Ok(Some(format!("{start}(?:{bare}){end}")))
        }
        (None, shortest, longest) => {
            let longest = longest.map(|n| n.to_string()).unwrap_or_default();
            Ok(Some(format!("(?s:.{{{},{longest}}})", shortest.unwrap_or(0))))
        }
        _ => Err(GrammarError("a pattern together with a length".to_owned())),
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Kinds {
    text: bool,
    other: bool,
}

impl Kinds {
    fn or(self, other: Kinds) -> Kinds {
        Kinds { text: self.text || other.text, other: self.other || other.other }
    }

    fn of_value(value: &Value) -> Kinds {
        Kinds { text: value.is_string(), other: !value.is_string() }
    }

    fn of_type(name: &str) -> Kinds {
        Kinds { text: name == "string", other: name != "string" }
    }
}
