//! From a request that was understood to a job for the scheduler.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::http::StatusCode;
use deepseek_recipe::request::{ConversationRequest, OutputConstraint};
use deepseek_recipe_core::conversation::ResponseFormat;
use ds4_engine::{TokenId, sampling::SamplingParams};
use ds4_runtime::{
    ClientId, Request as Job,
    grammar::{AnswerGrammar, Grammar, Rules, ToolSet, strictly},
};
use ds4_text::{
    prompt::EncodedPrompt,
    request::{Options, Request},
};
use serde_json::json;

use super::{error::ApiError, preparing::pauses, state::App};

/// The official service's share in thinking mode with tools.
const TOP_P_WITH_TOOLS: f32 = 0.95;

/// A job, and the prompt's text for the trace.
pub(crate) struct Prepared {
    pub(crate) job: Job,
    /// The end of the prompt from the marker on, if it opens a block of tool calls.
    pub(crate) opening: Vec<TokenId>,
    pub(crate) prompt_text: String,
}

/// Makes a job. Takes the time of tokenizing the prompt and compiling grammars.
pub(crate) fn prepare(
    app: &App,
    client: ClientId,
    request: &Request,
) -> Result<Prepared, ApiError> {
    let EncodedPrompt { text, ids: prompt } = prompt(app, request)?;
    let Request { converted: request, options } = request;
    let context = app.config.scheduler.context;
    if prompt.len() >= context {
        let param = if options.raw_prompt.is_some() { "prompt" } else { "messages" };
        return Err(ApiError::context(param, prompt.len(), context));
    }
    let grammar = grammar(app, request, options)?;
    let opening = opening(app, &prompt, request);
    let left = context - prompt.len();
    let asked = request.inference_options.max_tokens.map_or(left, |tokens| tokens as usize);
    let limit = app.config.request_timeout;
    let job = Job {
        client,
        max_tokens: asked.clamp(1, left),
        sampling: sampling(request, options),
        seed: options.seed.unwrap_or_else(|| fastrand::u64(..)),
        top_logprobs: request
            .inference_options
            .logprobs
            .then(|| usize::from(request.inference_options.top_logprobs.unwrap_or(0))),
        grammar,
        deadline: (limit > Duration::ZERO).then(|| Instant::now() + limit),
        prompt,
    };
    Ok(Prepared { job, opening, prompt_text: text })
}

fn opening(app: &App, prompt: &[TokenId], request: &ConversationRequest) -> Vec<TokenId> {
    let dsml = app.encoder.tokenizer().special().dsml;
    let marker = prompt.iter().rposition(|token| *token == dsml);
    let marker = marker.filter(|_| request.parsing_options.starts_in_tool_calls);
    marker.map_or_else(Vec::new, |at| prompt[at..].to_vec())
}

/// The prompt, in which remembered blocks of calls are as they were sampled.
pub(crate) fn prompt(app: &App, request: &Request) -> Result<EncodedPrompt, ApiError> {
    let EncodedPrompt { text, ids } =
        request.encode(&app.encoder, &mut pauses(|| app.runtime.load().running() > 0))?;
    let special = app.encoder.tokenizer().special();
    let ids = app.replay.restore_blocks(&request.converted.conversation, special, ids);
    Ok(EncodedPrompt { text, ids })
}

/// What the client says, in thinking mode too, and otherwise the model's usual settings.
fn sampling(request: &ConversationRequest, options: &Options) -> SamplingParams {
    let usual = SamplingParams::default();
    let with_tools = request.conversation.thinking_mode && request.parsing_options.parse_tool_calls;
    let usual_top_p = if with_tools { TOP_P_WITH_TOOLS } else { usual.top_p };
    SamplingParams {
        temperature: options.temperature.unwrap_or(usual.temperature),
        top_p: options.top_p.unwrap_or(usual_top_p),
        min_p: options.min_p.unwrap_or(usual.min_p),
        top_k: options.top_k.unwrap_or(usual.top_k),
    }
}

fn grammar(
    app: &App,
    request: &ConversationRequest,
    options: &Options,
) -> Result<Option<AnswerGrammar>, ApiError> {
    let parsing = &request.parsing_options;
    let tools = parsing.parse_tool_calls.then(|| {
        let named = options.named_tool.as_deref();
        let mut tools = request.conversation.tools.clone();
        for tool in tools.iter_mut().filter(|tool| tool.strict == Some(true)) {
            if let Some(schema) = options.strict_schemas.get(&tool.name) {
                tool.parameters = strictly(schema.clone());
            }
        }
        ToolSet::compile(&app.grammars, &tools, named, !options.single_call)
    });
    let thinking = parsing.thinking_initial_stage;
    Ok(AnswerGrammar::new(Rules {
        grammars: Arc::clone(&app.grammars),
        starts_in_reasoning: thinking.is_some_and(|stage| stage.starts_in_reasoning()),
        format: format(app, request)?,
        tools: tools.transpose()?,
        starts_in_tool_calls: parsing.starts_in_tool_calls,
    }))
}

/// The form of the text. The conversion changes a schema if it is to be kept to strictly.
fn format(app: &App, request: &ConversationRequest) -> Result<Option<Grammar>, ApiError> {
    let schema = match &request.inference_options.output_constraint {
        Some(OutputConstraint::Json { schema: Some(schema) }) => Some(schema.clone()),
        _ => None,
    };
    let grammar = match &request.conversation.response_format {
        ResponseFormat::Text => return Ok(None),
        ResponseFormat::JsonObject => app.grammars.json_schema(&json!({ "type": "object" })),
        ResponseFormat::JsonSchema(asked) => {
            app.grammars.json_schema(schema.as_ref().unwrap_or(asked))
        }
        ResponseFormat::Regex(expression) => app.grammars.regex(expression),
    };
    grammar.map(Some).map_err(|error| ApiError {
        status: StatusCode::BAD_REQUEST,
        param: Some("response_format".to_owned()),
        ..ApiError::from(error)
    })
}
