"""a1111"""
from fastapi import APIRouter
router = APIRouter()
