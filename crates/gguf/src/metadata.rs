//! Metadata: an ordered map from keys to typed values, with getters whose
//! errors name the file, the key, what was found and what was expected.

use std::fmt;

use indexmap::IndexMap;

use crate::Error;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A metadata array: all elements have one type, and none is an array.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Applies one expression to the elements of an array, whatever their type.
macro_rules! with_elements {
    ($array:expr, $elements:ident => $body:expr) => {
        match $array {
            Array::U8($elements) => $body,
            Array::I8($elements) => $body,
            Array::U16($elements) => $body,
            Array::I16($elements) => $body,
            Array::U32($elements) => $body,
            Array::I32($elements) => $body,
            Array::F32($elements) => $body,
            Array::Bool($elements) => $body,
            Array::String($elements) => $body,
            Array::U64($elements) => $body,
            Array::I64($elements) => $body,
            Array::F64($elements) => $body,
        }
    };
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        with_elements!(self, elements => elements.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Name of the element type, such as `u32`.
    pub fn type_name(&self) -> &'static str {
        match self {
            Array::U8(_) => "u8",
            Array::I8(_) => "i8",
            Array::U16(_) => "u16",
            Array::I16(_) => "i16",
            Array::U32(_) => "u32",
            Array::I32(_) => "i32",
            Array::F32(_) => "f32",
            Array::Bool(_) => "bool",
            Array::String(_) => "string",
            Array::U64(_) => "u64",
            Array::I64(_) => "i64",
            Array::F64(_) => "f64",
        }
    }

    /// Number of the element type in a file.
    pub(crate) fn type_id(&self) -> u32 {
        match self {
            Array::U8(_) => 0,
            Array::I8(_) => 1,
            Array::U16(_) => 2,
            Array::I16(_) => 3,
            Array::U32(_) => 4,
            Array::I32(_) => 5,
            Array::F32(_) => 6,
            Array::Bool(_) => 7,
            Array::String(_) => 8,
            Array::U64(_) => 10,
            Array::I64(_) => 11,
            Array::F64(_) => 12,
        }
    }

    /// The elements, if all are non-negative integers that fit in a `T`.
    fn integers<T: TryFrom<u64>>(&self) -> Option<Vec<T>> {
        fn convert<S: Copy, T>(elements: &[S]) -> Option<Vec<T>>
        where
            u64: TryFrom<S>,
            T: TryFrom<u64>,
        {
            elements.iter().map(|&e| T::try_from(u64::try_from(e).ok()?).ok()).collect()
        }
        match self {
            Array::U8(elements) => convert(elements),
            Array::I8(elements) => convert(elements),
            Array::U16(elements) => convert(elements),
            Array::I16(elements) => convert(elements),
            Array::U32(elements) => convert(elements),
            Array::I32(elements) => convert(elements),
            Array::U64(elements) => convert(elements),
            Array::I64(elements) => convert(elements),
            Array::F32(_) | Array::Bool(_) | Array::String(_) | Array::F64(_) => None,
        }
    }
}

impl fmt::Display for Array {
    /// The first elements in brackets, and how many there are if not all.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        with_elements!(self, elements => {
            f.write_str("[")?;
            for (index, element) in elements.iter().take(SHOWN).enumerate() {
                write!(f, "{}{element:?}", if index == 0 { "" } else { ", " })?;
            }
            f.write_str(if elements.len() > SHOWN { ", …]" } else { "]" })?;
        });
        if self.len() > SHOWN {
            write!(f, " ({} elements)", self.len())?;
        }
        Ok(())
    }
}

impl Value {
    /// Name of the type, such as `u32` or `array of string`.
    pub fn type_name(&self) -> String {
        let name = match self {
            Value::U8(_) => "u8",
            Value::I8(_) => "i8",
            Value::U16(_) => "u16",
            Value::I16(_) => "i16",
            Value::U32(_) => "u32",
            Value::I32(_) => "i32",
            Value::F32(_) => "f32",
            Value::Bool(_) => "bool",
            Value::String(_) => "string",
            Value::Array(array) => return format!("array of {}", array.type_name()),
            Value::U64(_) => "u64",
            Value::I64(_) => "i64",
            Value::F64(_) => "f64",
        };
        name.to_owned()
    }

    /// Number of the type in a file.
    pub(crate) fn type_id(&self) -> u32 {
        match self {
            Value::U8(_) => 0,
            Value::I8(_) => 1,
            Value::U16(_) => 2,
            Value::I16(_) => 3,
            Value::U32(_) => 4,
            Value::I32(_) => 5,
            Value::F32(_) => 6,
            Value::Bool(_) => 7,
            Value::String(_) => 8,
            Value::Array(_) => 9,
            Value::U64(_) => 10,
            Value::I64(_) => 11,
            Value::F64(_) => 12,
        }
    }

    /// The value as a non-negative integer, whatever its width and sign.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::I8(v) => v.try_into().ok(),
            Value::U16(v) => Some(v.into()),
            Value::I16(v) => v.try_into().ok(),
            Value::U32(v) => Some(v.into()),
            Value::I32(v) => v.try_into().ok(),
            Value::U64(v) => Some(v),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::U8(v) => v.fmt(f),
            Value::I8(v) => v.fmt(f),
            Value::U16(v) => v.fmt(f),
            Value::I16(v) => v.fmt(f),
            Value::U32(v) => v.fmt(f),
            Value::I32(v) => v.fmt(f),
            Value::F32(v) => v.fmt(f),
            Value::Bool(v) => v.fmt(f),
            Value::String(v) => write!(f, "{v:?}"),
            Value::Array(v) => v.fmt(f),
            Value::U64(v) => v.fmt(f),
            Value::I64(v) => v.fmt(f),
            Value::F64(v) => v.fmt(f),
        }
    }
}

/// Lets Rust values be written as metadata of the type that matches theirs.
macro_rules! value_from {
    ($($type:ty => $variant:ident;)*) => {$(
        impl From<$type> for Value {
            fn from(value: $type) -> Self {
                Value::$variant(value)
            }
        }

        impl From<Vec<$type>> for Value {
            fn from(elements: Vec<$type>) -> Self {
                Value::Array(Array::$variant(elements))
            }
        }
    )*};
}

value_from! {
    u8 => U8; i8 => I8; u16 => U16; i16 => I16; u32 => U32; i32 => I32; u64 => U64; i64 => I64;
    f32 => F32; f64 => F64; bool => Bool; String => String;
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::String(value.to_owned())
    }
}

/// A Rust type that metadata values can be read as.
pub trait FromValue<'a>: Sized {
    /// What an error message calls it.
    const EXPECTED: &'static str;

    /// The value as this type, if that loses nothing that matters: integers
    /// of any width are interchangeable if not negative, and so are f32 and f64.
    fn from_value(value: &'a Value) -> Option<Self>;
}

/// Implements [`FromValue`] with a closure.
macro_rules! from_value {
    ($($type:ty, $expected:literal, $convert:expr;)*) => {$(
        impl<'a> FromValue<'a> for $type {
            const EXPECTED: &'static str = $expected;

            fn from_value(value: &'a Value) -> Option<Self> {
                let convert: fn(&'a Value) -> Option<Self> = $convert;
                convert(value)
            }
        }
    )*};
}

from_value! {
    u64, "non-negative integer", Value::as_u64;
    u32, "non-negative 32-bit integer", |value| value.as_u64()?.try_into().ok();
    usize, "non-negative integer", |value| value.as_u64()?.try_into().ok();
    f32, "float", |value| match *value {
        Value::F32(v) => Some(v),
        Value::F64(v) => Some(v as f32),
        _ => None,
    };
    bool, "bool", |value| match *value {
        Value::Bool(v) => Some(v),
        _ => None,
    };
    &'a str, "string", |value| match value {
        Value::String(v) => Some(v),
        _ => None,
    };
    &'a [String], "array of string", |value| match value {
        Value::Array(Array::String(v)) => Some(v),
        _ => None,
    };
    Vec<usize>, "array of non-negative integers", |value| match value {
        Value::Array(v) => v.integers(),
        _ => None,
    };
    Vec<u32>, "array of non-negative 32-bit integers", |value| match value {
        Value::Array(v) => v.integers(),
        _ => None,
    };
    Vec<f32>, "array of floats", |value| match value {
        Value::Array(Array::F32(v)) => Some(v.clone()),
        Value::Array(Array::F64(v)) => Some(v.iter().map(|&v| v as f32).collect()),
        _ => None,
    };
}

/// The metadata of one file, in file order.
#[derive(Debug, Clone)]
pub struct Metadata {
    file: String,
    entries: IndexMap<String, Value>,
}

impl Metadata {
    /// `entries` of the file that messages call `file`.
    pub(crate) fn new(file: String, entries: IndexMap<String, Value>) -> Self {
        Metadata { file, entries }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// All entries in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key` as a `T`, or `None` if the key is absent.
    ///
    /// # Errors
    /// [`Error::WrongType`] if the key is there with another type.
    pub fn optional<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match T::from_value(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.wrong_type(key, value, T::EXPECTED)),
        }
    }

    /// The value of `key` as a `T`.
    ///
    /// # Errors
    /// [`Error::MissingKey`] or [`Error::WrongType`].
    pub fn required<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, Error> {
        let missing = || Error::MissingKey { file: self.file.clone(), key: key.to_owned() };
        self.optional(key)?.ok_or_else(missing)
    }

    /// A required non-negative integer. Errors as [`Metadata::required`].
    pub fn u64(&self, key: &str) -> Result<u64, Error> {
        self.required(key)
    }

    /// A required count or size. Errors as [`Metadata::required`].
    pub fn usize(&self, key: &str) -> Result<usize, Error> {
        self.required(key)
    }

    /// A required float. Errors as [`Metadata::required`].
    pub fn f32(&self, key: &str) -> Result<f32, Error> {
        self.required(key)
    }

    /// A required bool. Errors as [`Metadata::required`].
    pub fn bool(&self, key: &str) -> Result<bool, Error> {
        self.required(key)
    }

    /// A required string. Errors as [`Metadata::required`].
    pub fn str(&self, key: &str) -> Result<&str, Error> {
        self.required(key)
    }

    /// A required array of strings. Errors as [`Metadata::required`].
    pub fn strings(&self, key: &str) -> Result<&[String], Error> {
        self.required(key)
    }

    /// A required array of counts or sizes. Errors as [`Metadata::required`].
    pub fn usize_array(&self, key: &str) -> Result<Vec<usize>, Error> {
        self.required(key)
    }

    /// A required array of non-negative integers. Errors as [`Metadata::required`].
    pub fn u32_array(&self, key: &str) -> Result<Vec<u32>, Error> {
        self.required(key)
    }

    /// A required array of floats. Errors as [`Metadata::required`].
    pub fn f32_array(&self, key: &str) -> Result<Vec<f32>, Error> {
        self.required(key)
    }

    /// The error for `value`, which was to be `expected`. Numbers are shown,
    /// since it may be their sign or size that is wrong.
    fn wrong_type(&self, key: &str, value: &Value, expected: &'static str) -> Error {
        let found = match value {
            Value::String(_) | Value::Array(_) => value.type_name(),
            number => format!("{} {number}", number.type_name()),
        };
        Error::WrongType { file: self.file.clone(), key: key.to_owned(), found, expected }
    }
}
