//! JSON schemas of what requests hold, learned from the types themselves: fields and types from the default value, names of
//! variants from what the reader says it expects. Nothing is written down twice.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// A name that nothing has.
const NOBODY: &str = "?";

/// Reads a value where the schema's value would stand, and tells what was wrong with it.
type Read<'a> = &'a dyn Fn(Value) -> Result<(), String>;

/// Returns the schema of a type whose fields may all be absent.
pub(super) fn schema_of<T: Serialize + DeserializeOwned + Default>() -> Value {
    let default = serde_json::to_value(T::default()).expect("defaults are representable in JSON");
    let read = |value: Value| {
        serde_json::from_value::<T>(value)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    schema(&default, &read)
}

fn schema(default: &Value, read: Read) -> Value {
    let mut schema = match default {
        Value::Null => return absent(read),
        Value::Bool(_) => json!({"type": "boolean"}),
        Value::Number(number) if number.is_u64() => json!({"type": "integer", "minimum": 0}),
        Value::Number(_) => json!({"type": "number"}),
        Value::String(_) => text(read),
        Value::Array(items) => array(items, read),
        // Fields have defaults of their own.
        Value::Object(fields) => return object(fields, read),
    };
    schema["default"] = default.clone();
    schema
}

/// Returns the schema of a field that may be absent, and null where that is read: the first kind of value that is read, or whose names are told.
fn absent(read: Read) -> Value {
    let nullable = |mut schema: Value| {
        if read(Value::Null).is_err() {
            return schema;
        }
        schema["type"] = json!([schema["type"], "null"]);
        // Indexing would put a null there.
        if let Some(names) = schema.get_mut("enum").and_then(Value::as_array_mut) {
            names.push(Value::Null);
        }
        schema
    };
    if variants(read, json!(NOBODY)).is_some() {
        return nullable(text(read));
    }
    let tries = [
        (json!(true), json!({"type": "boolean"})),
        (json!(0.5), json!({"type": "number"})),
        (json!(16), json!({"type": "integer", "minimum": 0})),
        (
            json!([16, 16, 16]),
            json!({"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 3, "maxItems": 3}),
        ),
        (json!([NOBODY]), json!({"type": "array", "items": {"type": "string"}})),
    ];
    if let Some((_, schema)) = tries.into_iter().find(|(value, _)| read(value.clone()).is_ok()) {
        return nullable(schema);
    }
    match read(json!({})) {
        Ok(()) => nullable(object(&Map::new(), read)),
        // A document of the server's own, such as a cursor: it is sent back as it came.
        Err(_) => json!({"type": ["object", "array", "null"]}),
    }
}

fn text(read: Read) -> Value {
    match variants(read, json!(NOBODY)) {
        Some(names) => json!({"type": "string", "enum": names}),
        None => json!({"type": "string"}),
    }
}

fn array(items: &[Value], read: Read) -> Value {
    let Some(first) = items.first() else {
        let one = |value: Value| read(json!([value]));
        return json!({"type": "array", "items": text(&one)});
    };
    let item = match first {
        Value::Number(number) if number.is_u64() => json!({"type": "integer", "minimum": 0}),
        _ => json!({"type": "number"}),
    };
    json!({"type": "array", "items": item, "minItems": items.len(), "maxItems": items.len()})
}

/// Returns the schema of a structure, whose reader refuses unknown fields, or of shares by name.
fn object(fields: &Map<String, Value>, read: Read) -> Value {
    let refusal = read(json!({NOBODY: 0.5})).err().unwrap_or_default();
    if !refusal.starts_with("unknown field") {
        let share = json!({"type": "number", "minimum": 0});
        let mut schema = json!({"type": "object", "additionalProperties": share});
        if let Some(names) = variants(read, json!({NOBODY: 0.5})) {
            schema["propertyNames"] = json!({"enum": names});
        }
        return schema;
    }
    let property = |name: String| {
        let one = |value: Value| read(json!({name.as_str(): value}));
        let schema = schema(fields.get(&name).unwrap_or(&Value::Null), &one);
        (name, schema)
    };
    let properties: Map<String, Value> = expected(&refusal).into_iter().map(property).collect();
    json!({"type": "object", "properties": properties, "additionalProperties": false})
}

/// Returns the names that a reader expects in the place of one that nothing has.
fn variants(read: Read, value: Value) -> Option<Vec<String>> {
    let refusal = read(value).err()?;
    refusal.starts_with("unknown variant").then(|| expected(&refusal))
}

/// Returns the names in backticks after the word "expected".
fn expected(refusal: &str) -> Vec<String> {
    let (_, names) = refusal.split_once("expected").unwrap_or_default();
    names.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::delivery::Delivery;
    use crate::stream::recipe::Recipe;

    #[test]
    fn fields_types_and_names_are_learned() {
        let recipe = schema_of::<Recipe>();
        let field = |name: &str| &recipe["properties"][name];
        assert_eq!(recipe["additionalProperties"], false);
        assert_eq!(*field("seed"), json!({"type": "integer", "minimum": 0, "default": 0}));
        assert_eq!(field("fallback")["enum"], json!(["healthy", "real", "best"]));
        assert_eq!(field("synthesizer")["type"], json!(["string", "null"]));
        assert_eq!(field("patch")["minItems"], 3);
        let nullable = json!({"type": ["integer", "null"], "minimum": 0});
        assert_eq!(*field("patches_per_epoch"), nullable);
        assert_eq!(
            field("sizes")["propertyNames"]["enum"],
            json!(["tiny", "small", "medium", "large"])
        );
        assert_eq!(field("organs")["additionalProperties"]["type"], "number");
        assert_eq!(field("gate")["properties"]["recall"]["type"], "number");
        assert!(field("select")["properties"]["hold_out_hashes"].is_object());
        // What is left out while it is off is a number all the same.
        assert_eq!(field("augment")["properties"]["blur"], json!({"type": "number"}));
        let delivery = schema_of::<Delivery>();
        let outputs = &delivery["properties"]["outputs"]["items"]["enum"];
        assert_eq!(*outputs, json!(["source", "soft_mask", "lesion_instance"]));
        assert_eq!(delivery["properties"]["count"]["type"], json!(["integer", "null"]));
    }
}
